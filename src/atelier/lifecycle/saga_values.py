"""The drivers' values as JSON and back, for the outputs that the saga log keeps. Used by the sagas' steps.

An older manager wrote what a newer one reads: add fields with defaults, never rename one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from atelier.model.machine import (
    BootFiles,
    Disk,
    DiskFile,
    GuestAddress,
    MemoryImage,
    MemoryStream,
    NetworkAttachment,
    ProcessIdentity,
)


def disk_to_json(disk: Disk) -> dict[str, Any]:
    return {
        "serial": disk.serial,
        "top": _file_to_json(disk.top),
        "backing": [_file_to_json(file) for file in disk.backing],
        "read_only": disk.read_only,
    }


def disk_from_json(value: dict[str, Any]) -> Disk:
    return Disk(
        serial=value["serial"],
        top=_file_from_json(value["top"]),
        backing=tuple(_file_from_json(file) for file in value["backing"]),
        read_only=value["read_only"],
    )


def boot_files_to_json(boot: BootFiles) -> dict[str, Any]:
    return {
        "kernel": str(boot.kernel),
        "initramfs": str(boot.initramfs),
        "tools": str(boot.tools),
        "kernel_release": boot.kernel_release,
        "tools_id": boot.tools_id,
    }


def boot_files_from_json(value: dict[str, Any]) -> BootFiles:
    return BootFiles(
        kernel=Path(value["kernel"]),
        initramfs=Path(value["initramfs"]),
        tools=Path(value["tools"]),
        kernel_release=value["kernel_release"],
        tools_id=value["tools_id"],
    )


def network_to_json(attachment: NetworkAttachment) -> dict[str, Any]:
    return asdict(attachment)


def network_from_json(value: dict[str, Any]) -> NetworkAttachment:
    guest = value.get("guest")
    return NetworkAttachment(
        value["kind"],
        value["mac_address"],
        GuestAddress(**guest) if guest else None,
        # Absent in what an older manager wrote.
        value.get("device_name", ""),
    )


def process_to_json(identity: ProcessIdentity) -> dict[str, Any]:
    return asdict(identity)


def process_from_json(value: dict[str, Any]) -> ProcessIdentity:
    return ProcessIdentity(value["pid"], value["start_time_ticks"], value["boot_id"])


def restore_to_json(memory: MemoryStream | MemoryImage) -> dict[str, str]:
    match memory:
        case MemoryStream(path):
            return {"stream": str(path)}
        case MemoryImage(file, state):
            return {"memory": str(file), "state": str(state)}


def restore_from_json(value: dict[str, str] | None) -> MemoryStream | MemoryImage | None:
    """None: the machine boots."""
    if value is None:
        return None
    if stream := value.get("stream"):
        return MemoryStream(Path(stream))
    return MemoryImage(Path(value["memory"]), Path(value["state"]))


def _file_to_json(file: DiskFile) -> dict[str, str]:
    return {"path": str(file.path), "format": file.format}


def _file_from_json(value: dict[str, Any]) -> DiskFile:
    return DiskFile(Path(value["path"]), value["format"])
