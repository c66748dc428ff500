"""``GET /archive?path=`` streams a folder's content as an uncompressed tar; ``POST /archive?path=`` unpacks one into a
folder, made if absent. Ours, not E2B's: it carries ``atelier cp`` of folders.

Registered by the agent's ``__main__``. The work is done by the tools image's ``busybox tar`` (or a ``tar`` from PATH),
running as the user. A tar that fails is never passed over: before the first byte it is an error, later it breaks the
chunked stream off. Unpacking cannot be undone: what had arrived before an error stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable
from typing import Final

from atelier.guest_agent.credentials import acting_as
from atelier.guest_agent.entries import errors_about, make_parents, show
from atelier.guest_agent.http import HttpError, Request, Response, Router, json_response
from atelier.guest_agent.spawn import DEFAULT_PATH, spawn
from atelier.guest_agent.state import AgentState
from atelier.guest_agent.users import User

BUSYBOX: Final = "/opt/shared/bin/busybox"
_PIECE_BYTES: Final = 256 * 1024
_PIPE_BYTES: Final = 1024 * 1024
_COMPLAINT_MAX_BYTES: Final = 2000


def register(router: Router, state: AgentState) -> None:
    archives = Archives(state)
    router.add("GET", "/archive", archives.pack)
    router.add("POST", "/archive", archives.unpack)


def _tar_command() -> list[str]:
    if os.access(BUSYBOX, os.X_OK):
        return [BUSYBOX, "tar"]
    for folder in DEFAULT_PATH.split(":"):
        if os.access(f"{folder}/tar", os.X_OK):
            return [f"{folder}/tar"]
    raise HttpError(501, "unimplemented", "there is neither the tools image's busybox nor a tar in this sandbox")


class Archives:
    def __init__(self, state: AgentState) -> None:
        self._state = state

    def _target(self, request: Request) -> tuple[User, bytes]:
        user = self._state.user_of(request, (request.query_value("username") or b"").decode(errors="replace"))
        path = request.query_value("path")
        if not path:
            raise HttpError(400, "invalid_argument", "the query names no path")
        return user, self._state.resolve(path, user)

    async def pack(self, request: Request) -> Response:
        user, path = self._target(request)
        with errors_about("pack", path), acting_as(user):
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise HttpError(400, "invalid_argument", f"cannot pack {show(path)}: it is no folder")
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        tar = TarProcess([*_tar_command(), "-c", "-f", "-", "."], path, user)
        try:
            first = await tar.read()
            if not first:
                status = await tar.wait()
                raise HttpError(500, "internal", f"cannot pack {show(path)}: {tar.complaint(status)}")
        except BaseException:
            tar.close()
            raise
        return Response(200, {"content-type": "application/x-tar"}, _packed(tar, first))

    async def unpack(self, request: Request) -> Response:
        user, path = self._target(request)
        with errors_about("unpack into", path), acting_as(user):
            make_parents(path)
        # -o: what is unpacked belongs to the user, root included, whatever the archive says.
        tar = TarProcess([*_tar_command(), "-x", "-o", "-f", "-"], path, user)
        try:
            async for piece in request.iterate():
                if not await tar.write(piece):
                    break
            tar.end_input()
            status = await tar.wait()
        finally:
            tar.close()
        if status != 0:
            complaint = tar.complaint(status)
            code = 507 if "No space left" in complaint else 400
            raise HttpError(code, "failed_precondition", f"cannot unpack into {show(path)}: {complaint}")
        return json_response({})


async def _packed(tar: TarProcess, first: bytes) -> AsyncIterator[bytes]:
    try:
        piece = first
        while piece:
            yield piece
            piece = await tar.read()
        status = await tar.wait()
        if status != 0:
            # The server then ends the connection without the last chunk: no client takes that for success.
            raise RuntimeError(f"tar failed: {tar.complaint(status)}")
    finally:
        tar.close()


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class TarProcess:
    """A tar in the folder ``directory``; one that packs leaves its input alone, one that unpacks its output. Its end is
    seen through a pidfd, so that no other part of the agent that waits for children is concerned."""

    def __init__(self, command: list[str], directory: bytes, user: User) -> None:
        """Raises ConnectError when it cannot be started there."""
        self._loop = asyncio.get_running_loop()
        self._said = bytearray()
        self._status: int | None = None
        environment = {"PATH": DEFAULT_PATH, "HOME": user.home, "LC_ALL": "C"}
        spawned = spawn(command, environment, directory, user, with_stdin=True)
        self._pid = spawned.pid
        self._input, self._output, self._complaints = spawned.stdin, spawned.stdout, spawned.stderr
        self._pidfd = os.pidfd_open(self._pid)
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                # Fewer turns for both sides; at the limit for pipes the ordinary size must do.
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._loop.add_reader(self._complaints, self._hear)

    async def read(self) -> bytes:
        """The next piece of output, empty at its end."""
        while True:
            try:
                return os.read(self._output, _PIECE_BYTES)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader, self._output)

    async def write(self, piece: bytes | memoryview) -> bool:
        """Hand ``piece`` over; False when tar takes no more."""
        rest = memoryview(piece)
        while rest:
            try:
                rest = rest[os.write(self._input, rest) :]
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer, self._input)
            except BrokenPipeError:
                return False
        return True

    def end_input(self) -> None:
        descriptor, self._input = self._input, -1
        os.close(descriptor)

    async def wait(self) -> int:
        """The exit status; -N after signal N."""
        while self._status is None:
            await self._ready(self._loop.add_reader, self._loop.remove_reader, self._pidfd)
            self._reap(os.WNOHANG)
        self._hear()
        return self._status

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self._pid, options)
        except ChildProcessError:
            pid, status = self._pid, 255 << 8  # somebody else has reaped it: its status is lost, so it is no success
        if pid:
            self._status = os.waitstatus_to_exitcode(status)

    def complaint(self, status: int) -> str:
        said = self._said.decode(errors="replace").strip()
        return said or (f"tar ended with signal {-status}" if status < 0 else f"tar ended with status {status}")

    def close(self) -> None:
        """Let go of everything; a tar that still runs is killed with its group."""
        if self._pidfd < 0:
            return
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._reap(0)
        self._loop.remove_reader(self._complaints)
        for descriptor in (self._input, self._output, self._complaints, self._pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self._input = self._output = self._complaints = self._pidfd = -1

    def _hear(self) -> None:
        """Keep the beginning of what tar complains of, and let it go on complaining."""
        if self._complaints < 0:
            return
        try:
            heard = os.read(self._complaints, 65536)
        except BlockingIOError:
            return
        if not heard:
            self._loop.remove_reader(self._complaints)
        self._said += heard[: _COMPLAINT_MAX_BYTES - len(self._said)]

    async def _ready(self, add: Callable[..., object], remove: Callable[[int], object], descriptor: int) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        add(descriptor, _set, ready)
        try:
            await ready
        finally:
            remove(descriptor)
