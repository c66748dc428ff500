"""The files of one VMM in its run directory, and how they are opened to be handed over.

Called by the VMM drivers and the KVM probe. The folder stays the manager's own, mode 0700: sockets listen before QEMU
runs and are inherited by it, so a VMM broken out of can put nothing in their place.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from atelier.drivers.vmm.qemu_arguments import MachineDescriptors
from atelier.host import processes
from atelier.host.files import disk_full_as_error, trim_to_tail, write_atomically
from atelier.model.errors import VmmError
from atelier.model.ids import is_sandbox_id
from atelier.model.layout import check_socket_path
from atelier.model.machine import BootFiles, ProcessIdentity

_BACKLOG = 16


@dataclass(frozen=True, slots=True)
class RunFolder:
    root: Path

    @property
    def console(self) -> Path:
        """What the guest wrote to its serial line."""
        return self.root / "console.log"

    @property
    def stderr(self) -> Path:
        """What QEMU said. There from just before the first start on."""
        return self.root / "qemu.log"

    @property
    def control_socket(self) -> Path:
        return self.root / "control.sock"

    @property
    def guest_socket(self) -> Path:
        return self.root / "guest.sock"

    @property
    def identity(self) -> Path:
        """Pid, start time and boot id of the VMM as JSON."""
        return self.root / "vmm.json"

    @property
    def jailed(self) -> Path:
        """What the Firecracker driver has to know of its machine, as JSON."""
        return self.root / "jailed.json"

    def trim_console(self, limit_bytes: int) -> None:
        """As ``VmmDriver.trim_console``."""
        # Half of it stays, so that a console at the limit is not rewritten each time.
        trim_to_tail(self.console, limit_bytes, keep_bytes=limit_bytes // 2)

    def keep_identity(self, identity: ProcessIdentity) -> None:
        write_atomically(self.identity, json.dumps(asdict(identity)).encode(), durable=False)

    def find_identity(self) -> ProcessIdentity | None:
        """What was written down at the start, if that process lives."""
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            kept = ProcessIdentity(**json.loads(self.identity.read_bytes()))
            if processes.is_alive(kept):
                return kept
        return None


def sandboxes_of(names: Iterable[str], sandboxes_directory: Path) -> list[str]:
    """Those of ``names`` that are sandbox ids, and those that have a run directory; sorted."""
    found = set(names)
    with contextlib.suppress(FileNotFoundError):
        found.update(entry.name for entry in sandboxes_directory.iterdir())
    return sorted(filter(is_sandbox_id, found))


@contextmanager
def opened_machine(folder: RunFolder, boot: BootFiles | None) -> Generator[MachineDescriptors]:
    """Boot files, if it boots, console and the two listening sockets, open for as long as the block runs."""
    with contextlib.ExitStack() as stack:
        yield MachineDescriptors(
            kernel=stack.enter_context(opened(boot.kernel)) if boot else None,
            initramfs=stack.enter_context(opened(boot.initramfs)) if boot else None,
            console=stack.enter_context(opened(folder.console, os.O_WRONLY | os.O_APPEND | os.O_CREAT)),
            control_socket=stack.enter_context(_listening(folder.control_socket)),
            guest_socket=stack.enter_context(_listening(folder.guest_socket)),
        )


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Generator[int]:
    """A descriptor of a file that belongs to a machine. Raises VmmError that names a file that is not there."""
    try:
        with disk_full_as_error(f"opening {path}"):
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise VmmError(
            f"the machine cannot be started: {path}: {error.strerror}",
            hint="an image or volume was removed or is another user's; see 'atelier doctor'",
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _listening(path: Path) -> Generator[int]:
    check_socket_path(path)
    # Left by a VMM that is gone: the caller has made sure of that.
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        yield listener.fileno()
