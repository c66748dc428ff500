"""What must be known of a machine to restore it elsewhere in time: what it was made of, and its memory on disk.

Rows of sandboxes and snapshots keep these as JSON; the lifecycle compares them before a restore. A field that a newer
Atelier adds has a default, so that a restore of what an older one saved goes on working.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atelier.model.machine import MachineStamp


@dataclass(frozen=True, slots=True)
class MachineRecord:
    """``stamp`` must fit for a restore. The rest is recorded only: ``tools`` is the file of the tools image that the
    guest has mounted and partly in its memory, so a restored machine gets that one, not the newest."""

    stamp: MachineStamp
    tools: Path
    tools_id: str
    kernel_release: str

    def to_json(self) -> dict[str, Any]:
        return {
            "stamp": self.stamp.to_json(),
            "tools": str(self.tools),
            "tools_id": self.tools_id,
            "kernel_release": self.kernel_release,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> MachineRecord:
        return cls(
            MachineStamp.from_json(value["stamp"]), Path(value["tools"]), value["tools_id"], value["kernel_release"]
        )


@dataclass(frozen=True, slots=True)
class SavedMemory:
    """The memory of a paused sandbox, in a file of its own. ``checksum`` is empty until it was computed; ``boot_id``
    names the host's boot in which the file was last known to be whole."""

    machine: MachineRecord
    size_bytes: int
    boot_id: str
    checksum: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine.to_json(),
            "size_bytes": self.size_bytes,
            "boot_id": self.boot_id,
            "checksum": self.checksum,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SavedMemory:
        machine = MachineRecord.from_json(value["machine"])
        return cls(machine, value["size_bytes"], value["boot_id"], value["checksum"])
