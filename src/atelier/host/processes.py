"""Long-lived processes that outlive their starter: started detached, known by identity, ended with proof.

Called by the VMM drivers and by the programs that start one another. A process is named by ``ProcessIdentity`` (pid,
start time, boot id), never by its pid alone, so one that merely bears the same number is never touched. What is started
here is nobody's child: it belongs to init, leaves no zombie, and survives its starter.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import mmap
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from atelier.host.command import show
from atelier.host.files import disk_full_as_error, read_tail
from atelier.model.errors import CommandError, HostError, MissingProgramError, TimeoutExceededError
from atelier.model.machine import ProcessIdentity

_PROC = Path("/proc")
_STDERR_TAIL_BYTES = 2000
# Tells its pid on the pipe that is its stdout, then becomes the program; the pipe's end tells that it has done so.
_ANNOUNCE_AND_EXEC = 'umask 077; echo "$$"; exec "$@" >&2'
_BECOMING = b"\0".join([b"sh", b"-c", _ANNOUNCE_AND_EXEC.encode(), b"sh", b""])
"""How the command line of a process begins that is about to become a program."""
_BECOMING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """Limits of a process, None: as inherited. Source: getrlimit(2).

    ``file_size_ceiling_bytes``: what the process, its user included, may raise ``file_size_bytes`` to; None: no further.
    """

    open_files: int | None = None
    file_size_bytes: int | None = None
    file_size_ceiling_bytes: int | None = None
    core_bytes: int | None = 0


@dataclass(frozen=True, slots=True)
class ProcessUser:
    """Whom a process runs as. Changing it needs root."""

    user_id: int
    group_id: int
    supplementary_group_ids: tuple[int, ...] = ()


@functools.cache
def boot_id() -> str:
    """The kernel's name for this boot. Source: random(4)."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def find_identity(pid: int) -> ProcessIdentity | None:
    """The identity of the live process ``pid``; None if there is none or it is a zombie."""
    try:
        stat_line = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The program's name, in parentheses, may hold anything; what follows the last one is fixed. Source: proc(5).
    fields = stat_line.rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return ProcessIdentity(pid, int(fields[19]), boot_id())


def is_alive(identity: ProcessIdentity) -> bool:
    return find_identity(identity.pid) == identity


def runs(identity: ProcessIdentity, executable_name: str, arguments: Sequence[str]) -> bool:
    """Whether this very process lives, and is of an executable file of this name with ``arguments`` in a row.

    Where this user may not see the executable file of another one's process, the arguments decide.
    """
    try:
        if _in_a_row(arguments) not in (_PROC / str(identity.pid) / "cmdline").read_bytes():
            return False
        with contextlib.suppress(PermissionError):
            if _executable_name(str(identity.pid)) != executable_name:
                return False
    except (FileNotFoundError, ProcessLookupError):
        return False
    # Looked at afterwards: what was read is this process's only if it bears the pid still.
    return is_alive(identity)


def user_id(pid: int) -> int:
    """Whom the process belongs to. Raises FileNotFoundError when there is none."""
    return (_PROC / str(pid)).stat().st_uid


def find_processes(executable_name: str, arguments: Sequence[str]) -> list[ProcessIdentity]:
    """Live processes whose executable file has this name and whose argument list holds ``arguments`` in a row.

    One that a starter had begun to start is among them, though the starter may be dead: either it ends before it has
    become the program, or it is waited for. Processes that this user may not look at are passed over.

    Raises TimeoutExceededError for one that becomes nothing.
    """
    return [identity for identity, _ in _scan(executable_name, _in_a_row(arguments))]


def _in_a_row(arguments: Sequence[str]) -> bytes:
    """As they stand in /proc/<pid>/cmdline behind another one."""
    return b"\0".join([b"", *(argument.encode() for argument in arguments), b""])


def _executable_name(pid: str) -> str:
    return (_PROC / pid / "exe").readlink().name.removesuffix(" (deleted)")


def list_argument_values(executable_name: str, option: str, prefix: str) -> list[str]:
    """What follows ``prefix`` in the argument after ``option``, of each live process whose executable file has this
    name; one look at /proc for all. As for ``find_processes``.
    """
    wanted = f"\0{option}\0{prefix}".encode()
    found = (command_line for _, command_line in _scan(executable_name, wanted))
    return [line.partition(wanted)[2].partition(b"\0")[0].decode(errors="replace") for line in found]


def _scan(executable_name: str, wanted: bytes) -> Iterator[tuple[ProcessIdentity, bytes]]:
    """Live processes of this executable with ``wanted`` in their command line, and that whole."""
    for entry in os.scandir(_PROC):
        if not entry.name.isdigit():
            continue
        # A process may end at any moment of this, or hide behind its rights.
        try:
            command_line = _settled_command_line(entry.name, executable_name, wanted)
            if wanted not in command_line:
                continue
            executable = _executable_name(entry.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        identity = find_identity(int(entry.name))
        if identity is not None and executable == executable_name:
            yield identity, command_line


def _settled_command_line(pid: str, executable_name: str, wanted: bytes) -> bytes:
    """The command line of a process; where that shows that it is about to become a program with ``wanted``, the one that
    it has then. If its starter died before it told its pid it ends by that, writing into a pipe that nobody reads.
    Source: pipe(7). Raises OSError when it is gone."""
    deadline = time.monotonic() + _BECOMING_SECONDS
    while True:
        command_line = (_PROC / pid / "cmdline").read_bytes()
        if command_line:
            is_settled = not (command_line.startswith(_BECOMING) and wanted in command_line)
        else:
            # As those of the kernel's and of the dead are, which have no executable; and for an instant in execve(2).
            is_settled = _executable_name(pid) != executable_name
        if is_settled:
            return command_line
        if time.monotonic() > deadline:
            raise TimeoutExceededError(
                f"process {pid} does not become {executable_name} within {_BECOMING_SECONDS:g} s",
                hint=f"it may hang in the kernel; see dmesg and /proc/{pid}",
            )
        time.sleep(0.0005)


def resident_bytes(identity: ProcessIdentity) -> int:
    """Memory of this machine that the process holds, shared pages in full; 0 if it is gone. Source: proc(5), statm."""
    try:
        pages = int((_PROC / str(identity.pid) / "statm").read_bytes().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # Looked at afterwards: if it lives now, it lived then.
    return pages * mmap.PAGESIZE if is_alive(identity) else 0


async def start_detached(
    arguments: Sequence[str],
    *,
    stderr_path: Path,
    user: ProcessUser | None = None,
    limits: ResourceLimits = ResourceLimits(),
    pass_descriptors: Sequence[int] = (),
    directory: Path = Path("/"),
    timeout_seconds: float = 10.0,
) -> ProcessIdentity:
    """Start a program that is not this process's child, in a session of its own, with no privilege to gain.

    Its stdin is empty; stdout and stderr are appended to ``stderr_path`` (made with mode 0600). Its environment is
    PATH and LANG only. ``pass_descriptors`` keep their numbers; all others are closed. Returns when the program has
    been executed; it may still fail on its own after that.

    Raises MissingProgramError, CommandError with what it wrote (it could not be executed or died at once),
    TimeoutExceededError.
    """
    program = shutil.which(arguments[0])
    if program is None:
        raise MissingProgramError(f"{arguments[0]} is not installed", hint=f"install {arguments[0]}")
    chain = [
        *_limiter(limits),
        *privilege_dropper(user),
        "sh",
        "-c",
        _ANNOUNCE_AND_EXEC,
        "sh",
        program,
        *arguments[1:],
    ]
    # In a thread, not through the event loop: uvloop's own subprocesses inherit descriptors that nobody passed.
    starting = asyncio.ensure_future(
        asyncio.to_thread(_start, chain, stderr_path, tuple(pass_descriptors), directory, timeout_seconds)
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        # Whoever gave up would never learn the pid: what came up meanwhile has to end here.
        with contextlib.suppress(HostError, TimeoutExceededError):
            await kill_and_wait(await starting)
        raise


def _start(
    chain: list[str], stderr_path: Path, pass_descriptors: tuple[int, ...], directory: Path, timeout_seconds: float
) -> ProcessIdentity:
    deadline = time.monotonic() + timeout_seconds
    with disk_full_as_error(f"writing {stderr_path}"):
        stderr = os.open(stderr_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        launcher = subprocess.Popen(
            # Forks and exits at once: the process proper is handed over to init.
            ["setsid", "--fork", *chain],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=directory,
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C"},
            pass_fds=pass_descriptors,
        )
    except FileNotFoundError as error:
        if not directory.is_dir():
            raise CommandError(f"cannot run {show(chain)}: no folder {directory}") from error
        raise MissingProgramError("setsid is not installed", hint="apt-get install util-linux") from error
    finally:
        os.close(stderr)
    assert launcher.stdout is not None
    with launcher.stdout as announcement:
        line = _read_until_closed(announcement.fileno(), deadline).strip()
    launcher.wait()
    pid = int(line) if line.isdigit() else 0
    identity = find_identity(pid) if pid else None
    while identity is not None and is_alive(identity):
        if _ANNOUNCE_AND_EXEC.encode() not in _command_line(pid):
            return identity
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutExceededError(f"{show(chain)} did not start within {timeout_seconds:g} s")
        time.sleep(0.0005)
    said = read_tail(stderr_path, _STDERR_TAIL_BYTES).decode(errors="replace").strip()
    raise CommandError(f"{show(chain)}: ended at once: {said}")


def _read_until_closed(descriptor: int, deadline: float) -> bytes:
    """What the pipe carried until its end or the deadline."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    content = b""
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(descriptor, 64)
        if not chunk:
            break
        content += chunk
    return content


def _command_line(pid: int) -> bytes:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _limiter(limits: ResourceLimits) -> list[str]:
    file_size_ceiling = (
        limits.file_size_bytes if limits.file_size_ceiling_bytes is None else limits.file_size_ceiling_bytes
    )
    given = {
        "nofile": (limits.open_files, limits.open_files),
        "fsize": (limits.file_size_bytes, file_size_ceiling),
        "core": (limits.core_bytes, limits.core_bytes),
    }
    return ["prlimit", *(f"--{name}={soft}:{hard}" for name, (soft, hard) in given.items() if soft is not None)]


def privilege_dropper(user: ProcessUser | None) -> list[str]:
    """The words before a command by which it runs as this user, None: as the present one, with no privilege to gain."""
    if user is None:
        return ["setpriv", "--no-new-privs"]
    groups = ",".join(str(group) for group in user.supplementary_group_ids)
    return [
        "setpriv",
        f"--reuid={user.user_id}",
        f"--regid={user.group_id}",
        f"--groups={groups}" if groups else "--clear-groups",
        "--no-new-privs",
    ]


async def kill_and_wait(
    identity: ProcessIdentity, timeout_seconds: float = 10.0, *, signal_number: int = signal.SIGKILL
) -> None:
    """Kill exactly this process and return when it is dead. Another one that bears its pid is left alone.
    ``signal_number`` may be SIGTERM for a program that ends itself in order.

    Raises HostError (``process_not_ours``) without the right to, TimeoutExceededError if it does not die (it hangs in
    the kernel).
    """
    descriptor = _open_process(identity)
    if descriptor is None:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal_number)
        async with asyncio.timeout(timeout_seconds):
            await _readable(descriptor)
    except PermissionError as error:
        raise HostError(
            f"process {identity.pid} may not be killed by this user",
            code="process_not_ours",
            hint="run the manager as the user that started it",
        ) from error
    except TimeoutError as error:
        raise TimeoutExceededError(
            f"process {identity.pid} did not die within {timeout_seconds:g} s of {signal.Signals(signal_number).name}",
            hint="it hangs in the kernel; see dmesg",
        ) from error
    finally:
        os.close(descriptor)


async def wait_ended(identity: ProcessIdentity) -> None:
    """Return when this process is gone; at once if it is already. Nothing is polled."""
    descriptor = _open_process(identity)
    if descriptor is None:
        return
    try:
        await _readable(descriptor)
    finally:
        os.close(descriptor)


def _open_process(identity: ProcessIdentity) -> int | None:
    """A pidfd for exactly this process, or None if it is gone."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    # Checked after opening: from here on the descriptor and the checked process are the same, whatever the pid becomes.
    if is_alive(identity):
        return descriptor
    os.close(descriptor)
    return None


async def _readable(descriptor: int) -> None:
    """Source: pidfd_open(2): a pidfd becomes readable when its process ends."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def report() -> None:
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(descriptor, report)
    try:
        await ended
    finally:
        loop.remove_reader(descriptor)
