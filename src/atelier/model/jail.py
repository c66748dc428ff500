"""What a jailed VMM needs of root, as values: asked for by the Firecracker driver, granted by ``host.jails`` in whoever is root.

Names of files in a jail are the same for every machine (``JAIL_*``): a saved machine finds its disks and its socket by
them again, wherever it goes on. A test pins them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from atelier.model.machine import ProcessIdentity
from atelier.model.machine_limits import ProcessorAndMemoryLimits

JAIL_API_SOCKET = "api.sock"
JAIL_GUEST_SOCKET = "v.sock"
JAIL_KERNEL = "kernel"
JAIL_INITRAMFS = "initramfs"
JAIL_DISK = "disk"
JAIL_TOOLS = "tools"
JAIL_MEMORY = "memory"
JAIL_STATE = "state"
"""What a machine is restored from."""
JAIL_SAVED_MEMORY = "saved-memory"
JAIL_SAVED_STATE = "saved-state"
"""What a machine is saved to."""
JAIL_LOG = "vmm.log"
JAIL_METRICS = "metrics"

_READ_ONLY = frozenset({JAIL_KERNEL, JAIL_INITRAMFS, JAIL_TOOLS, JAIL_MEMORY, JAIL_STATE})
_VMMS_OWN = frozenset({JAIL_LOG, JAIL_METRICS, JAIL_SAVED_MEMORY, JAIL_SAVED_STATE})
_MACHINE_ID = re.compile(r"at-([a-z0-9]{1,16})-([a-z0-9]{1,32})")
_TAP = re.compile(r"at[a-z0-9]{1,13}")


def machine_id(installation_id: str, sandbox_id: str) -> str:
    """What the jailer calls a machine. Source: Firecracker docs/jailer.md: at most 64 letters, digits and hyphens."""
    return f"at-{installation_id}-{sandbox_id}"


@dataclass(frozen=True, slots=True)
class JailLink:
    """A file of the manager's that the VMM may read, under this name in the jail. It is linked, not copied, so it lies
    on the jails' file system; it is readable to all, in a folder that is the manager's own."""

    source: Path
    name: str


@dataclass(frozen=True, slots=True)
class JailRequest:
    """``disk``: the block device or file that becomes the VMM's to write to. ``tap``: the TAP that becomes the VMM's to
    open, empty: none; its link is down until ``set_link`` unless ``link_up``."""

    machine_id: str
    user_id: int
    links: tuple[JailLink, ...]
    disk: Path
    empty_files: tuple[str, ...] = ()
    tap: str = ""
    link_up: bool = True


@dataclass(frozen=True, slots=True)
class JailStart:
    """``console``: the file in the manager's run directory that the VMM's output is appended to. ``limits``: of the
    machine's cgroup, where the host has cgroup v2. ``file_bytes``: how large a file may become; a block device is none."""

    machine_id: str
    user_id: int
    console: Path
    limits: ProcessorAndMemoryLimits
    file_bytes: int
    open_files: int = 256


@dataclass(frozen=True, slots=True)
class Jail:
    """What there is of a machine: its jail, its process, or both. ``user_id`` is 0 where nothing tells it."""

    machine_id: str
    user_id: int
    process: ProcessIdentity | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Jail:
        """Raises KeyError, TypeError, ValueError for what ``to_json`` has not made."""
        process = value["process"]
        return cls(str(value["machine_id"]), int(value["user_id"]), ProcessIdentity(**process) if process else None)


@dataclass(frozen=True, slots=True)
class JailPlaces:
    """Where jails lie. Pure path arithmetic. Source: Firecracker docs/jailer.md: the jailer's own folders."""

    base: Path
    executable_name: str

    @property
    def folder(self) -> Path:
        return self.base / self.executable_name

    def jail(self, machine_id: str) -> Path:
        return self.folder / machine_id

    def file(self, machine_id: str, name: str) -> Path:
        """What the VMM knows as ``/name``."""
        return self.jail(machine_id) / "root" / name


def request_to_json(request: JailRequest | JailStart) -> dict[str, Any]:
    return _without_paths(asdict(request))


def jail_request_from_json(value: dict[str, Any]) -> JailRequest:
    """Raises KeyError, TypeError, ValueError; ``check`` says whether what it returns may be granted."""
    return JailRequest(
        machine_id=word_from_json(value["machine_id"]),
        user_id=_number(value["user_id"]),
        links=tuple(
            JailLink(Path(word_from_json(each["source"])), word_from_json(each["name"])) for each in value["links"]
        ),
        disk=Path(word_from_json(value["disk"])),
        empty_files=file_names_from_json(value["empty_files"]),
        tap=word_from_json(value["tap"]),
        link_up=value["link_up"] is True,
    )


def jail_start_from_json(value: dict[str, Any]) -> JailStart:
    """As ``jail_request_from_json``."""
    limits = {name: _number(value["limits"][name]) for name in ProcessorAndMemoryLimits.__slots__}
    return JailStart(
        word_from_json(value["machine_id"]),
        _number(value["user_id"]),
        Path(word_from_json(value["console"])),
        ProcessorAndMemoryLimits(**limits),
        _number(value["file_bytes"]),
        _number(value["open_files"]),
    )


def check_machine_id(name: str) -> None:
    """Raises ValueError for what ``machine_id`` has not made."""
    if not _MACHINE_ID.fullmatch(name):
        raise ValueError(f"{name!r} is no machine's id")


def check_file_name(name: str) -> None:
    """Raises ValueError for anything but a file that a VMM writes: only such ones are made or taken out."""
    if name not in _VMMS_OWN:
        raise ValueError(f"{name!r} is no file that a VMM writes")


def check_request(request: JailRequest) -> None:
    """Raises ValueError with the reason why nobody may be granted this, whoever asks."""
    check_machine_id(request.machine_id)
    names = [link.name for link in request.links]
    if not _READ_ONLY.issuperset(names) or len(set(names)) != len(names):
        raise ValueError(f"a jail has no such files: {', '.join(names)}")
    for name in request.empty_files:
        check_file_name(name)
    for path in (request.disk, *(link.source for link in request.links)):
        if not path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{path} is no absolute path")
    check_tap(request.tap)


def check_tap(name: str) -> None:
    """Raises ValueError for what is no TAP of ours; an empty name is none."""
    if name and not _TAP.fullmatch(name):
        raise ValueError(f"{name!r} is no TAP of a sandbox's")


def file_names_from_json(value: object) -> tuple[str, ...]:
    """Raises TypeError."""
    if not isinstance(value, list):
        raise TypeError("a list of names was expected")
    return tuple(word_from_json(each) for each in cast("list[object]", value))


def word_from_json(value: object) -> str:
    """Raises TypeError."""
    if not isinstance(value, str) or "\0" in value:
        raise TypeError("a word was expected")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("a number was expected")
    return value


def _without_paths(value: Any) -> Any:
    """The same with paths as words, as JSON takes them."""
    match value:
        case dict():
            return {name: _without_paths(each) for name, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
        case tuple() | list():
            return [_without_paths(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
        case Path():
            return str(value)
        case _:
            return value
