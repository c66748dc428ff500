"""Interface of the guest drivers: what the host asks of a running guest, by way of the guest channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from atelier.model.guest import (
    FileEntry,
    GuestIdentity,
    GuestMetrics,
    ProcessEvent,
    ProcessSpec,
    ProcessSummary,
    TerminalSize,
)
from atelier.model.machine import GuestEndpoint
from atelier.model.terminal import TerminalEvent, TerminalSession


class GuestTerminals(Protocol):
    """The terminals of guests that live on while nobody looks at them: they are in the guest's memory, so they outlive a
    manager, a gateway and a pause, and go when the sandbox stops. At most 32 in a guest, each with 16 viewers.

    Raises what ``GuestDriver`` raises, NotFoundError with the code ``terminal_not_found``, and GuestError
    (``guest_resource_exhausted``) where no more terminals or viewers are taken.
    """

    async def list(self, sandbox_id: str) -> list[TerminalSession]:
        """Oldest first. One whose program has ended stays until it is closed, for an hour, or until room is needed."""
        ...

    async def open(self, sandbox_id: str, spec: ProcessSpec, title: str = "") -> TerminalSession:
        """Start ``spec``, which has a terminal, in a terminal. Without ``title`` it has the one that its program says."""
        ...

    def attach(
        self, sandbox_id: str, terminal: str, size: TerminalSize | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[TerminalEvent]]:
        """Look at a terminal in a window of ``size`` (None: in none): TerminalJoined, the kept output, TerminalReplayed,
        what follows, ProcessEnded. Who reads too slowly gets TerminalLost, and holds nobody up. The terminal is as
        large as the smallest of its windows."""
        ...

    async def write(self, sandbox_id: str, terminal: str, data: bytes) -> None: ...

    async def resize(self, sandbox_id: str, terminal: str, size: TerminalSize, viewer: int = 0) -> None:
        """The window of ``viewer`` has another size; 0: what holds while there is no window."""
        ...

    async def rename(self, sandbox_id: str, terminal: str, title: str) -> TerminalSession:
        """``title`` empty: what its program says, again."""
        ...

    async def close(self, sandbox_id: str, terminal: str) -> None:
        """End its program, by force after 3 s, and list it no more."""
        ...


class GuestDriver(Protocol):
    """Talks to guests by sandbox id. Paths are bytes: a guest's file names need not be UTF-8; a relative path is
    taken from the home folder of ``user``.

    Raises GuestUnreachableError (transient) when the channel does not answer, GuestProtocolError when the guest
    breaks the protocol, NotFoundError (``path_not_found``, ``process_not_found``, ``program_not_found``), InvalidRequestError and
    AccessDeniedError as the guest says, GuestError for the rest. Every length and count that a guest sends is bounded.
    """

    @property
    def terminals(self) -> GuestTerminals: ...

    async def ensure_channel(self, sandbox_id: str, endpoint: GuestEndpoint, token: str) -> None:
        """Have the gateway (or the VMM itself) offer this sandbox's channel. ``token`` opens each epoch."""
        ...

    async def ensure_channel_absent(self, sandbox_id: str) -> None: ...

    async def list_channels(self) -> list[str]:
        """Sandbox ids whose channels are offered, sorted."""
        ...

    async def wait_ready(self, sandbox_id: str, timeout_seconds: float) -> None:
        """Return when the guest agent answers; raise TimeoutExceededError after ``timeout_seconds``."""
        ...

    async def initialize(self, sandbox_id: str, identity: GuestIdentity) -> None:
        """Set who the guest is: hostname, machine-id, clock, entropy, token, default environment, card, SSH host key,
        generation file.

        With ``identity.restored`` the machine was restored quiesced, whoever it was before: its root file system takes
        writes again, the tools image is mounted if it is not, its clock goes forward only, and the hooks of its owner
        are run (/etc/atelier/on-restore.d); its processes stand still until ``thaw``. May be asked again. Raises
        GuestError (``restore_hook_failed``) naming a hook that failed.
        """
        ...

    async def rename(self, sandbox_id: str, hostname: str, environment: dict[str, str]) -> None:
        """Give a guest that runs, and was told who it is, another hostname and default environment; nothing else
        changes, and none of the old environment stays. May be asked again."""
        ...

    async def quiesce(self, sandbox_id: str) -> None:
        """Return when the guest stands still, for a snapshot: all processes but PID 1 and the guest agent, and its root
        file system, with everything on its disk. Idempotent. Until ``thaw`` the guest answers ``wait_ready``,
        ``metrics``, ``initialize``, ``synchronize_clock`` and ``shut_down``; every other call waits.

        Raises GuestError (``quiesce_failed``) after about 10 s, or when the guest cannot; then nothing stands still.
        """
        ...

    async def thaw(self, sandbox_id: str) -> None:
        """Let everything go on. Idempotent, and nothing where nothing stands still."""
        ...

    async def synchronize_clock(self, sandbox_id: str) -> float:
        """Bring the guest's wall clock to the host's; returns by how many seconds it was off (guest minus host).

        A guest's time never jumps back for a little: see ``guest_agent.clock`` for what is slewed and what is stepped.
        """
        ...

    async def shut_down(self, sandbox_id: str) -> None:
        """Ask the guest to end its processes, write everything to disk and stop; returns when it has agreed. Its VMM
        then ends by itself, unless the guest hangs.

        Raises GuestUnreachableError also when the guest has stopped already.
        """
        ...

    async def metrics(self, sandbox_id: str) -> GuestMetrics: ...

    async def list_ports(self, sandbox_id: str) -> list[int]:
        """TCP ports on which programs in the guest listen, on its loopback or on all addresses; sorted."""
        ...

    def start_process(
        self, sandbox_id: str, spec: ProcessSpec
    ) -> AbstractAsyncContextManager[AsyncIterator[ProcessEvent]]:
        """Start a process; the iterator yields ProcessStarted, then outputs, then ProcessEnded.

        Leaving the context detaches; it does not end the process.
        """
        ...

    def connect_process(self, sandbox_id: str, pid: int) -> AbstractAsyncContextManager[AsyncIterator[ProcessEvent]]:
        """Attach to a process that runs: the newest kept output first, then what follows."""
        ...

    async def list_processes(self, sandbox_id: str) -> list[ProcessSummary]: ...

    async def send_input(self, sandbox_id: str, pid: int, data: bytes, *, terminal: bool = False) -> None: ...

    async def close_input(self, sandbox_id: str, pid: int) -> None: ...

    async def send_signal(self, sandbox_id: str, pid: int, signal_number: int) -> None: ...

    async def resize_terminal(self, sandbox_id: str, pid: int, size: TerminalSize) -> None: ...

    async def stat(self, sandbox_id: str, path: bytes, user: str = "") -> FileEntry: ...

    async def list_directory(self, sandbox_id: str, path: bytes, user: str = "", depth: int = 1) -> list[FileEntry]: ...

    async def make_directory(self, sandbox_id: str, path: bytes, user: str = "") -> FileEntry: ...

    async def move(self, sandbox_id: str, source: bytes, destination: bytes, user: str = "") -> FileEntry: ...

    async def remove(self, sandbox_id: str, path: bytes, user: str = "") -> None: ...

    def read_file(
        self, sandbox_id: str, path: bytes, user: str = "", *, offset: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """Yields (total size of the file in bytes, chunks of the range)."""
        ...

    async def write_file(self, sandbox_id: str, path: bytes, chunks: AsyncIterator[bytes], user: str = "") -> FileEntry:
        """Write the whole file under a temporary name, then rename: readers see the old or the new one."""
        ...

    def read_archive(
        self, sandbox_id: str, path: bytes, user: str = ""
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The folder's content as an uncompressed tar stream, names relative to the folder."""
        ...

    async def write_archive(self, sandbox_id: str, path: bytes, chunks: AsyncIterator[bytes], user: str = "") -> None:
        """Unpack a tar stream into the folder, which is made if absent."""
        ...
