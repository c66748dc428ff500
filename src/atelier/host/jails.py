"""Jails of Firecracker machines, built and ended by whoever is root: the manager itself, or the privileged helper.

One folder per machine below the jailer's, of the machine's own user. Nothing in it is trusted once its VMM has run:
no link is followed, and what is taken out of it is looked at first. It never touches a jail or process of another
installation, nor a process that its arguments do not prove to be the machine's.

Without root it works too, with one user for all, for a jailer that changes none: in tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atelier.host import processes
from atelier.host.file_lock import hold_lock
from atelier.host.files import refusal_as_error, sync_folder
from atelier.host.jailer import PARENT_CGROUP, jailer_arguments
from atelier.host.netlink import RouteSocket
from atelier.host.tap import set_owner
from atelier.model.errors import ConflictError, HostError, NotFoundError
from atelier.model.jail import (
    JAIL_API_SOCKET,
    JAIL_DISK,
    JAIL_GUEST_SOCKET,
    JAIL_LOG,
    JAIL_METRICS,
    Jail,
    JailLink,
    JailPlaces,
    JailRequest,
    JailStart,
    check_file_name,
    check_machine_id,
    check_request,
    check_tap,
    machine_id,
)
from atelier.model.machine import ProcessIdentity

_CGROUPS = Path("/sys/fs/cgroup")
_PASSED_MODE = 0o711
_ROOT_MODE = 0o710
"""The machine's user owns it, the manager's group may pass through to what it was granted."""
_WRITTEN_MODE = 0o640
_DISK_MODE = 0o660


class TapControl(Protocol):
    """What is done to a TAP, by name."""

    def set_owner(self, name: str, user_id: int) -> None: ...

    def set_link(self, name: str, *, up: bool) -> None: ...


class HostTaps:
    """TAPs of the namespace that this thread is in."""

    def set_owner(self, name: str, user_id: int) -> None:
        set_owner(name, user_id)

    def set_link(self, name: str, *, up: bool) -> None:
        with contextlib.closing(RouteSocket()) as routes:
            routes.set_up(routes.get_link(name).index, up)


@dataclass(frozen=True, slots=True)
class JailHost:
    """What is the same for all machines of an installation. ``user_id``, ``group_id``: the manager's. ``jailer``: the
    words that start it; ``process_names``: what its process's executable is called, before and after it has become
    Firecracker."""

    installation_id: str
    places: JailPlaces
    executable: Path
    jailer: tuple[str, ...]
    process_names: tuple[str, ...]
    user_id: int
    group_id: int
    network_namespace: Path | None = None


def root_host(
    installation_id: str, base: Path, executable: Path, jailer: Path, *, user_id: int, group_id: int
) -> JailHost:
    """For a Firecracker and its jailer, as released."""
    places = JailPlaces(base, executable.name)
    names = (executable.name, jailer.name)
    return JailHost(installation_id, places, executable, (str(jailer),), names, user_id, group_id)


class RootJails:
    """``VmmPrivileges``, done here and now. ``may_have_device``: whether a block device (its number) may become a
    machine's disk."""

    def __init__(
        self,
        host: JailHost,
        *,
        taps: TapControl | None = None,
        may_have_device: Callable[[int], bool] = lambda device: True,
    ) -> None:
        self._host = host
        self._taps = taps or HostTaps()
        self._may_have_device = may_have_device
        self._is_root = os.geteuid() == 0

    @property
    def places(self) -> JailPlaces:
        return self._host.places

    async def list_jails(self) -> list[Jail]:
        return await asyncio.to_thread(self._list)

    async def prepare_jail(self, request: JailRequest) -> None:
        with _refused():
            check_request(request)
            self._check_ours(request.machine_id)
        async with hold_lock(self.places.folder / ".lock"):
            await asyncio.to_thread(self._prepare, request)

    async def start(self, request: JailStart) -> ProcessIdentity:
        self._checked(request.machine_id)
        self._make_console(request.console)
        arguments = jailer_arguments(
            self._host.jailer,
            self._host.executable,
            self.places,
            request,
            with_cgroup=self._is_root and (_CGROUPS / "cgroup.controllers").exists(),
            network_namespace=self._host.network_namespace,
        )
        return await processes.start_detached(arguments, stderr_path=request.console)

    async def grant(self, machine_id: str) -> None:
        self._checked(machine_id)
        root = self.places.jail(machine_id) / "root"
        with _opened(root, f"opening the jail of {machine_id}") as descriptor:
            self._give(descriptor, _ROOT_MODE)
        for name, is_kind, mode in (
            (JAIL_API_SOCKET, stat.S_ISSOCK, 0o660),
            (JAIL_GUEST_SOCKET, stat.S_ISSOCK, 0o660),
            (JAIL_LOG, stat.S_ISREG, _WRITTEN_MODE),
            (JAIL_METRICS, stat.S_ISREG, _WRITTEN_MODE),
        ):
            with contextlib.suppress(NotFoundError), _opened(root / name, f"granting {name}") as descriptor:
                if is_kind(os.fstat(descriptor).st_mode):
                    self._give(descriptor, mode)

    async def add_files(self, machine_id: str, names: tuple[str, ...]) -> None:
        self._check_files(machine_id, names)
        user_id = self._owner(machine_id)
        for name in names:
            self._make_file(self.places.file(machine_id, name), user_id)

    async def take_file(self, machine_id: str, name: str, target: Path) -> None:
        self._check_files(machine_id, (name,))
        await asyncio.to_thread(self._take, self.places.file(machine_id, name), target)

    async def remove_files(self, machine_id: str, names: tuple[str, ...]) -> None:
        self._check_files(machine_id, names)
        for name in names:
            self.places.file(machine_id, name).unlink(missing_ok=True)

    async def flush_disk(self, machine_id: str) -> None:
        self._checked(machine_id)
        await asyncio.to_thread(_flush, self.places.file(machine_id, JAIL_DISK))

    async def set_link(self, machine_id: str, tap: str, *, up: bool) -> None:
        self._checked(machine_id)
        with _refused():
            check_tap(tap)
        self._taps.set_link(tap, up=up)

    async def kill(self, machine_id: str) -> None:
        self._checked(machine_id)
        while found := await asyncio.to_thread(self._find, machine_id):
            await processes.kill_and_wait(found)

    async def remove_jail(self, machine_id: str) -> None:
        self._checked(machine_id)
        async with hold_lock(self.places.folder / ".lock"):
            await asyncio.to_thread(self._remove, machine_id)

    # --- what may be asked for ----------------------------------------------------------------------------------------

    def _checked(self, name: str) -> None:
        with _refused():
            check_machine_id(name)
            self._check_ours(name)

    def _check_ours(self, name: str) -> None:
        if not name.startswith(machine_id(self._host.installation_id, "")):
            raise ValueError(f"{name!r} is another installation's machine")

    def _check_files(self, name: str, file_names: Sequence[str]) -> None:
        self._checked(name)
        with _refused():
            for file_name in file_names:
                check_file_name(file_name)

    # --- in a thread --------------------------------------------------------------------------------------------------

    def _list(self) -> list[Jail]:
        prefix = machine_id(self._host.installation_id, "")
        names = {
            prefix + rest
            for process_name in self._host.process_names
            for rest in processes.list_argument_values(process_name, "--id", prefix)
        }
        with contextlib.suppress(FileNotFoundError):
            names.update(entry.name for entry in os.scandir(self.places.folder) if entry.name.startswith(prefix))
        return [Jail(name, self._owner(name), self._find(name)) for name in sorted(names)]

    def _find(self, name: str) -> ProcessIdentity | None:
        for process_name in self._host.process_names:
            if found := processes.find_processes(process_name, ["--id", name]):
                return found[0]
        return None

    def _owner(self, name: str) -> int:
        """User id of the machine that this jail was made for; 0 without a jail."""
        try:
            return (self.places.jail(name) / "root").lstat().st_uid
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def _prepare(self, request: JailRequest) -> None:
        if self._find(request.machine_id) is not None:
            raise ConflictError(
                f"the machine {request.machine_id} runs in its jail", code="jail_in_use", hint="stop it first"
            )
        self._remove(request.machine_id)
        if self._is_root and request.user_id in {self._owner(entry.name) for entry in os.scandir(self.places.folder)}:
            raise ConflictError(f"the user id {request.user_id} is another machine's", code="jail_user_taken")
        root = self.places.jail(request.machine_id) / "root"
        with refusal_as_error(f"making the jail {root}"):
            # The jailer's folder and the machine's are for root alone to change, and for all to pass, whatever the umask.
            self.places.folder.chmod(_PASSED_MODE)
            root.parent.mkdir()
            root.parent.chmod(_PASSED_MODE)
            root.mkdir(mode=0o700)
            try:
                self._fill(root, request)
                self._own(root, request.user_id, _ROOT_MODE)
            except BaseException:
                self._remove(request.machine_id)
                raise

    def _fill(self, root: Path, request: JailRequest) -> None:
        for link in request.links:
            self._link(root, link)
        self._add_disk(root / JAIL_DISK, request)
        for name in request.empty_files:
            self._make_file(root / name, request.user_id)
        if request.tap:
            if self._is_root:
                self._taps.set_owner(request.tap, request.user_id)
            self._taps.set_link(request.tap, up=request.link_up)

    def _link(self, root: Path, link: JailLink) -> None:
        with _opened(link.source, f"linking {link.source} into a jail") as descriptor:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in (self._host.user_id, 0):
                raise HostError(
                    f"{link.source} may not be linked into a jail: it is no file of the manager's", code="jail_refused"
                )
            _link_descriptor(descriptor, link.source, root / link.name)

    def _add_disk(self, path: Path, request: JailRequest) -> None:
        try:
            # Followed: a volume's name below /dev is a link.
            found = request.disk.stat()
        except FileNotFoundError as error:
            raise _missing(request.disk) from error
        if stat.S_ISBLK(found.st_mode):
            if not self._may_have_device(found.st_rdev):
                raise HostError(f"{request.disk} is no volume of the manager's", code="jail_refused")
            os.mknod(path, stat.S_IFBLK | 0o600, found.st_rdev)
            os.chown(path, request.user_id, request.user_id)
            return
        with _opened(request.disk, f"linking {request.disk} into a jail") as descriptor:
            opened = os.fstat(descriptor)
            if not stat.S_ISREG(opened.st_mode) or opened.st_uid not in (self._host.user_id, 0):
                raise HostError(f"{request.disk} is no disk of the manager's", code="jail_refused")
            _link_descriptor(descriptor, request.disk, path)
        self._own(path, request.user_id, _DISK_MODE)

    def _make_file(self, path: Path, user_id: int) -> None:
        with refusal_as_error(f"making {path}"):
            path.unlink(missing_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        self._own(path, user_id, _WRITTEN_MODE)

    def _make_console(self, path: Path) -> None:
        """The manager's own, in a folder of the manager's."""
        self._check_folder(path.parent)
        with refusal_as_error(f"making {path}"):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o600)
        try:
            os.fchown(descriptor, self._host.user_id, self._host.group_id)
        finally:
            os.close(descriptor)

    def _check_folder(self, folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == self._host.user_id:
                return
        raise HostError(f"{folder} is no folder of the manager's", code="jail_refused")

    def _take(self, source: Path, target: Path) -> None:
        with _opened(source, f"taking {source.name} out of a jail") as descriptor:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise HostError(f"{source} is no file that a VMM wrote", code="jail_refused")
            self._check_folder(target.parent)
            _link_descriptor(descriptor, source, target)
        source.unlink()
        written = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchown(written, self._host.user_id, self._host.group_id)
            os.fchmod(written, 0o600)
            os.fsync(written)
        finally:
            os.close(written)
        sync_folder(target.parent)

    def _remove(self, name: str) -> None:
        jail = self.places.jail(name)
        disk = self.places.file(name, JAIL_DISK)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISREG(disk.lstat().st_mode):
                os.chown(disk, self._host.user_id, self._host.group_id, follow_symlinks=False)
                disk.chmod(0o600)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(jail)
        with contextlib.suppress(OSError):
            # Empty as soon as its process is gone; what a kernel still holds goes with the next one.
            (_CGROUPS / PARENT_CGROUP / name).rmdir()

    def _own(self, path: Path, user_id: int, mode: int) -> None:
        if self._is_root:
            os.chown(path, user_id, self._host.group_id, follow_symlinks=False)
        path.chmod(mode)

    def _give(self, descriptor: int, mode: int) -> None:
        """To the manager's group; the user stays. By /proc, as the descriptor is of the path alone."""
        path = f"/proc/self/fd/{descriptor}"
        os.chown(path, -1, self._host.group_id)
        os.chmod(path, mode)  # noqa: PTH101


@contextmanager
def _opened(path: Path, doing: str) -> Generator[int]:
    """The file itself, not what a link in its place leads to, without opening what it holds."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(path) from error
    except OSError as error:
        raise HostError(f"{doing}: {error.strerror}", code="jail_refused") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _link_descriptor(descriptor: int, source: Path, target: Path) -> None:
    try:
        # The folder is not looked at, but without one Python takes link(2), which links the link.
        os.link(f"/proc/self/fd/{descriptor}", target, src_dir_fd=descriptor, follow_symlinks=True)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise HostError(
                f"{source} and {target.parent} lie on different file systems",
                code="jail_on_other_file_system",
                hint="put images, data and jails on one file system: ATELIER_CACHE_DIR, ATELIER_DATA_DIR, ATELIER_JAILS_DIR",
            ) from error
        raise


def _flush(disk: Path) -> None:
    descriptor = os.open(disk, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _missing(path: Path) -> NotFoundError:
    return NotFoundError(
        f"there is no {path}", code="jail_file_missing", hint="an image or volume was removed; see 'atelier doctor'"
    )


@contextmanager
def _refused() -> Generator[None]:
    """What nobody may ask for, as an error of the host's."""
    try:
        yield
    except ValueError as error:
        raise HostError(f"the jail was refused: {error}", code="jail_refused") from error
