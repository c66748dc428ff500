"""What is said to a guest and what it answers, as values. The wire form lies in ``guest_protocol``."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from atelier.model.errors import InvalidRequestError
from atelier.model.machine import GuestAddress


@dataclass(frozen=True, slots=True)
class SshHostKey:
    """An Ed25519 key in OpenSSH's forms: the private key's file, and the public key's line without its end."""

    private_key: str = field(repr=False)
    public_key: str


@dataclass(frozen=True, slots=True)
class GuestIdentity:
    """Who the guest is. ``entropy`` is fresh random bytes (>= 32) that reseed the guest kernel;
    ``host_time_ns`` is the host's wall clock (ns since the epoch), taken just before it is sent."""

    hostname: str
    machine_id: str
    token: str
    entropy: bytes
    host_time_ns: int
    environment: dict[str, str] = field(default_factory=dict[str, str])
    network: GuestAddress | None = None
    """None: the guest's card keeps the addresses that it has."""
    mac_address: str = ""
    """Empty: the guest's card keeps the one that it has, or there is no card."""
    host_key: SshHostKey | None = None
    """Taken by a guest that had another ``machine_id`` before, or has no host key yet; else it keeps its own."""
    generation: str = ""
    """A fresh UUID for each boot and each restore, for the guest's own programs; empty: it keeps what it has."""
    restored: bool = False
    """The machine comes from a snapshot and stands still: it is told who it is before its processes go on."""


@dataclass(frozen=True, slots=True)
class TerminalSize:
    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to start. ``arguments[0]`` is the program. ``user`` empty: the image's default user (``user``).
    ``timeout_seconds`` ends the whole process group; None: no limit. ``stdin``: whether a pipe is kept open for input,
    else the process reads end-of-file at once. With ``terminal`` stdin, stdout and stderr are one PTY."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    working_directory: str = ""
    user: str = ""
    stdin: bool = False
    terminal: TerminalSize | None = None
    timeout_seconds: float | None = None
    tag: str = ""

    def __post_init__(self) -> None:
        words = (*self.arguments, *self.environment, *self.environment.values(), self.working_directory, self.user)
        if any("\0" in word for word in words):
            raise InvalidRequestError(
                "a word of the command, its environment, its folder or its user has a NUL byte",
                hint="no program can receive one",
            )


@dataclass(frozen=True, slots=True)
class ProcessStarted:
    pid: int


@dataclass(frozen=True, slots=True)
class ProcessOutput:
    """``stream`` is ``stdout``, ``stderr`` or ``pty``."""

    stream: str
    data: bytes


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """``exit_code`` is 128+N after signal N. ``status`` is a sentence (``exit status 1``, ``signal: killed``);
    ``error`` says why it ended if not by itself (``timeout``)."""

    exit_code: int
    status: str
    error: str = ""


ProcessEvent = ProcessStarted | ProcessOutput | ProcessEnded


@dataclass(frozen=True, slots=True)
class ProcessSummary:
    pid: int
    tag: str
    arguments: tuple[str, ...]
    working_directory: str
    terminal: bool


class EntryType(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One name in the guest's file system. ``mode`` holds the permission bits (0o7777 mask).

    ``raw_path`` is the exact path in bytes; ``name`` and ``path`` are for people: bytes that are no UTF-8 stand
    there as U+FFFD.
    """

    name: str
    path: str
    raw_path: bytes
    type: EntryType
    size_bytes: int
    mode: int
    owner: str
    group: str
    modified_at: datetime
    symlink_target: str = ""


@dataclass(frozen=True, slots=True)
class GuestMetrics:
    """``cpu_used_percent`` is of all vCPUs together, 0 to 100; sizes in bytes."""

    cpu_count: int
    cpu_used_percent: float
    memory_total_bytes: int
    memory_used_bytes: int
    disk_total_bytes: int
    disk_used_bytes: int
    uptime_seconds: float
