"""Interface of the VMM drivers: one virtual machine per sandbox, as a process that outlives the manager."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from atelier.model.machine import (
    BootFiles,
    DiskFile,
    GuestEndpoint,
    MachineSpec,
    MachineStamp,
    MemoryImage,
    MemoryStream,
    ProcessIdentity,
    SavedMachine,
)

SavingMoment = Callable[[], Awaitable[None]]
"""What the caller does at a certain moment of saving. What it raises is raised by ``save``."""


class VmmDriver(Protocol):
    """Starts and ends VMM processes. All methods may be called twice with the same words.

    Raises VmmError when the VMM refuses or dies, MissingProgramError when it is not installed.
    """

    @property
    def name(self) -> str:
        """``qemu-tcg``, ``qemu-kvm``, ``firecracker``, ``fake``."""
        ...

    @property
    def opens_network(self) -> bool:
        """Whether it opens a TAP itself, by ``NetworkAttachment.device_name``: nobody else may hold it open then, and
        ``ensure_started`` is given no descriptor."""
        ...

    def boot_id(self) -> str:
        """Names the host's present boot: a machine whose identity bears another boot id ended with that boot."""
        ...

    async def list_sandboxes(self, sandboxes_directory: Path) -> list[str]:
        """Ids of this installation's sandboxes that have a live VMM process, whoever started it, a jail, or a run
        directory in ``sandboxes_directory``; sorted. Another installation's processes never appear."""
        ...

    async def ensure_run_directory(self, sandbox_id: str, run_directory: Path) -> None:
        """Make the VMM's folder, closed to all others, the VMM's own user included where it has one: what the VMM needs
        of it is handed over open."""
        ...

    async def ensure_run_directory_absent(self, run_directory: Path) -> None:
        """Remove the folder with its sockets and console."""
        ...

    async def ensure_started(self, spec: MachineSpec, network_descriptor: int | None = None) -> ProcessIdentity:
        """Start the machine, or return the identity of the process that already runs it. ``network_descriptor``: the
        open TAP of a network of that kind; it stays the caller's to close.

        Returns once the guest's processor runs and the guest channel's socket can be connected to; the guest may be
        far from ready. With ``restore_from`` the guest goes on where it was saved, its network link down until
        ``open_link``; a process that was begun so and never came to run is ended and started anew.

        Raises VmmError, ``restore_failed`` when what was saved cannot be loaded.
        """
        ...

    async def find_process(self, sandbox_id: str, run_directory: Path) -> ProcessIdentity | None:
        """The live process of this sandbox's VMM, proved to be ours by executable and arguments, else None."""
        ...

    async def ensure_stopped(self, sandbox_id: str, run_directory: Path, identity: ProcessIdentity | None) -> None:
        """Kill the VMM and return when it is proved dead. ``identity`` is what ``ensure_started`` returned, if known;
        a process that only happens to bear the same pid is never touched."""
        ...

    async def wait_ended(self, identity: ProcessIdentity) -> None:
        """Return when the process is gone, without polling faster than once in 0.2 s."""
        ...

    async def resident_bytes(self, identities: Sequence[ProcessIdentity]) -> int:
        """The host's memory that these processes hold together, what they share counted for each; one that is gone
        holds none."""
        ...

    async def resize_disk(self, run_directory: Path, serial: str, size_mib: int) -> None:
        """Grow a disk of the running machine; the guest sees the new size at once, its file system is its own affair. A
        block device has that size already: its storage has grown it.

        Raises InvalidRequestError (``disk_cannot_shrink``) for less than it has, VmmError when no machine runs there or
        it has no such disk.
        """
        ...

    def guest_endpoint(self, run_directory: Path) -> GuestEndpoint:
        """Where the host side of this machine's guest channel begins."""
        ...

    async def console_tail(self, run_directory: Path, limit_bytes: int) -> bytes:
        """The newest bytes that the guest wrote to its serial console; empty if there are none."""
        ...

    async def trim_console(self, run_directory: Path, limit_bytes: int) -> None:
        """Bound the kept console: where it is longer than ``limit_bytes`` drop the older part."""
        ...

    async def resume_after_full_disk(self, run_directory: Path) -> bool:
        """Let a machine go on that was halted because the host had no room for what its guest wrote; True if it was.
        With still no room it is halted again at once, and its guest never learns of it. Raises VmmError."""
        ...

    async def stamp(self, boot: BootFiles, network_kind: str) -> MachineStamp:
        """What a machine that is saved here now depends on, and what one that is restored here would find."""
        ...

    async def open_link(self, run_directory: Path) -> None:
        """Connect the guest's network card: restored machines come up without. Nothing if it is, or has none."""
        ...

    async def save(
        self,
        run_directory: Path,
        target: Path,
        *,
        before_stop: SavingMoment | None = None,
        at_stop: SavingMoment | None = None,
        afterwards: SavingMoment | None = None,
    ) -> SavedMachine:
        """Write the running machine as a MemoryStream to ``target`` (mode 0600; whole and on the disk, or absent). What
        a manager that died has begun bears that name with ``.new`` behind it, until it is begun again.

        With ``before_stop`` its memory is sent while it runs, and that is awaited once, still then, when little is left
        (it quiesces the guest). ``at_stop`` is awaited once, while the machine stands still and its disks are still the
        old ones (it switches one). Afterwards the machine stays stopped, until ``go_on`` or its end; with
        ``afterwards`` it runs as soon as all is sent, and that is awaited once, from that moment on and before the
        stream is on the disk (it thaws the guest). A machine that could not be saved runs, and no file is left; what the callbacks did is theirs to
        take back.

        Raises VmmError, ConflictError (``saving``) when it is being saved, DiskFullError, HostError.
        """
        ...

    async def go_on(self, run_directory: Path) -> None:
        """Let a saved machine run on, or one whose manager died while it saved; nothing if it runs."""
        ...

    def disk_switch(self, run_directory: Path, serial: str, top: DiskFile) -> AbstractAsyncContextManager[SavingMoment]:
        """Make ready that the guest's writes to this disk go to ``top``, an empty qcow2 file over the present top. They
        do when what the block is given was awaited, by ``at_stop`` or while the machine runs; the present top is not
        written to any more. Nothing if they do already, as where storage freezes copies of a volume that is used on.
        Both raise VmmError (``disk_cannot_switch`` for a VMM that has no overlays)."""
        ...

    async def writes_to(self, run_directory: Path, serial: str, file: DiskFile) -> bool:
        """Whether ``file``, whatever it was called when it was handed over, is what the guest's writes to this disk go
        to: so it is found out whether a switch took place. Raises VmmError when no machine runs there."""
        ...

    async def bake(self, stream: MemoryStream, stamp: MachineStamp, spec: MachineSpec, image: MemoryImage) -> None:
        """Turn a stream into an image: two new files (mode 0400), the state last; each whole or absent, ``.new`` as
        above.

        ``stamp`` is that of the saved machine, ``spec`` its own but for two things: ``sandbox_id`` names what is baked, and
        ``run_directory`` is made and removed here. Its disks and its TAP are not touched. What a manager that died
        meanwhile has left is ended by the next ``bake`` or ``ensure_stopped`` of this id.

        Raises VmmError (``bake_failed``), DiskFullError.
        """
        ...
