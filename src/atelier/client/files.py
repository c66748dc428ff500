"""``sandbox.files``: reading, writing and copying files of a sandbox, blocking (Files) and on asyncio (AsyncFiles).

Paths in the sandbox are text or bytes; a relative one starts at the home folder of ``user`` (empty: the image's
default user). Every method raises errors of ``model.errors``: NotFoundError (``path_not_found``), AccessDeniedError,
PreconditionError when the sandbox does not run, TransientError when it does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeGuard, TypeVar

from atelier.client import calls
from atelier.client.addresses import RemotePath
from atelier.client.connection import AsyncConnectionLease, ConnectionLease
from atelier.client.folder_reader import PackReport, pack_folder
from atelier.client.folder_writer import FolderWriter, UnpackLimits, UnpackReport
from atelier.client.local_errors import local_error
from atelier.client.local_files import ProgressReporter, open_for_reading, read_pieces, replace_file, size_of
from atelier.model.errors import ConflictError, HostError, InvalidRequestError, NotFoundError
from atelier.schemas.files import FileEntry

T = TypeVar("T")
LocalPath = str | Path


def _is_file(data: object) -> TypeGuard[BinaryIO]:
    return hasattr(data, "read")


def _decoded(data: bytes, path: RemotePath) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{calls.shown_path(path)} is no UTF-8 text", code="not_text", hint="use read_bytes"
        ) from error


def _target_folder(local: LocalPath) -> Path:
    folder = Path(local)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConflictError(
            f"{folder} exists and is no folder", code="target_in_the_way", hint="choose another local path"
        ) from error
    except OSError as error:
        raise local_error(bytes(folder), "make", error) from error
    return folder


def _source_folder(local: LocalPath) -> Path:
    folder = Path(local)
    if not folder.is_dir():
        raise HostError(f"{folder} is no folder", code="local_file_error", hint="check the local path")
    return folder


def _write_locally(target: BinaryIO, chunk: bytes, path: LocalPath, on_progress: ProgressReporter | None) -> None:
    try:
        target.write(chunk)
    except OSError as error:
        raise local_error(bytes(Path(path)), "write", error) from error
    if on_progress is not None:
        on_progress(len(chunk))


class Files:
    """The files of one sandbox."""

    def __init__(self, lease: ConnectionLease, sandbox: str) -> None:
        self._lease = lease
        self._sandbox = sandbox

    def read(self, path: RemotePath, *, user: str = "") -> str:
        """The whole file as UTF-8 text."""
        return _decoded(self.read_bytes(path, user=user), path)

    def read_bytes(self, path: RemotePath, *, user: str = "", offset: int = 0, length: int | None = None) -> bytes:
        """The file, or ``length`` bytes from ``offset`` on. For large files use ``stream`` or ``download``."""
        return self._lease.connection.send(calls.read_file(self._sandbox, path, user, offset, length))

    @contextmanager
    def stream(self, path: RemotePath, *, user: str = "") -> Generator[Iterator[bytes]]:
        """The file's bytes in pieces, as they come; an answer that breaks off raises."""
        operation = f"read {calls.shown_path(path)} in {self._sandbox}"
        address = calls.files_path(self._sandbox, path, user)
        with self._lease.connection.open_stream(operation, "GET", address) as response:
            yield response.iter_bytes()

    @contextmanager
    def stream_archive(self, path: RemotePath, *, user: str = "") -> Generator[Iterator[bytes]]:
        """A folder's content as a tar stream. Unpack it with care: the sandbox wrote it (``download_folder`` does)."""
        operation = f"copy the folder {calls.shown_path(path)} from {self._sandbox}"
        address = calls.files_path(self._sandbox, path, user, "/archive")
        with self._lease.connection.open_stream(operation, "GET", address) as response:
            yield response.iter_bytes()

    def write(self, path: RemotePath, data: str | bytes | BinaryIO | Iterable[bytes], *, user: str = "") -> FileEntry:
        """Write the whole file: text (as UTF-8), bytes, an open file or an iterable of bytes, which are streamed.

        Folders above it are made. Readers see the old file or the new one.
        """
        if isinstance(data, str):
            data = data.encode("utf-8")
        if isinstance(data, bytes):
            return self._lease.connection.send(calls.write_file(self._sandbox, path, user, data))
        if _is_file(data):
            return self._send_file(path, data, user, None)
        return self._lease.connection.send(calls.write_file(self._sandbox, path, user, None), content=data)

    def _send_file(
        self, path: RemotePath, file: BinaryIO, user: str, on_progress: ProgressReporter | None
    ) -> FileEntry:
        call = calls.write_file(self._sandbox, path, user, None, size_of(file))
        return self._lease.connection.send(call, content=read_pieces(file, on_progress))

    def stat(self, path: RemotePath, *, user: str = "") -> FileEntry:
        return self._lease.connection.send(calls.stat_file(self._sandbox, path, user))

    def exists(self, path: RemotePath, *, user: str = "") -> bool:
        try:
            self.stat(path, user=user)
        except NotFoundError as error:
            if error.code == "sandbox_not_found":
                raise
            return False
        return True

    def list(self, path: RemotePath = ".", *, user: str = "", depth: int = 1) -> list[FileEntry]:
        """What is in a folder, ``depth`` levels deep (1 to 64)."""
        return self._lease.connection.send(calls.list_directory(self._sandbox, path, user, depth)).items

    def remove(self, path: RemotePath, *, user: str = "") -> None:
        """Remove a file, or a folder with all that is in it."""
        self._lease.connection.send(calls.remove_file(self._sandbox, path, user))

    def make_directory(self, path: RemotePath, *, user: str = "") -> FileEntry:
        """Make a folder and the folders above it. Raises ConflictError (``already_exists``) if it is there."""
        return self._lease.connection.send(calls.make_directory(self._sandbox, path, user))

    def move(self, source: RemotePath, destination: RemotePath, *, user: str = "") -> FileEntry:
        return self._lease.connection.send(calls.move_file(self._sandbox, source, destination, user))

    def upload(
        self, local: LocalPath, remote: RemotePath, *, user: str = "", on_progress: ProgressReporter | None = None
    ) -> FileEntry:
        """Copy one local file to ``remote`` (the file's own path there, no folder)."""
        with open_for_reading(Path(local)) as file:
            return self._send_file(remote, file, user, on_progress)

    def download(
        self, remote: RemotePath, local: LocalPath, *, user: str = "", on_progress: ProgressReporter | None = None
    ) -> None:
        """Copy one file to ``local`` (its own path here). It appears whole or not at all."""
        with self.stream(remote, user=user) as chunks, replace_file(Path(local)) as target:
            for chunk in chunks:
                _write_locally(target, chunk, local, on_progress)

    def upload_folder(
        self, local: LocalPath, remote: RemotePath, *, user: str = "", on_progress: ProgressReporter | None = None
    ) -> PackReport:
        """Copy the content of a local folder into the folder ``remote``, which is made if absent."""
        report = PackReport()
        content = pack_folder(_source_folder(local), report, on_progress)
        self._lease.connection.send(calls.write_archive(self._sandbox, remote, user), content=content)
        return report

    def download_folder(
        self,
        remote: RemotePath,
        local: LocalPath,
        *,
        user: str = "",
        limits: UnpackLimits | None = None,
        on_progress: ProgressReporter | None = None,
    ) -> UnpackReport:
        """Copy the content of the folder ``remote`` into the local folder, which is made if absent.

        The sandbox is not trusted: see ``folder_writer`` for what is refused and what is left out.
        """
        with (
            self.stream_archive(remote, user=user) as chunks,
            FolderWriter(_target_folder(local), limits) as writer,
        ):
            for chunk in chunks:
                writer.feed(chunk)
                if on_progress is not None:
                    on_progress(len(chunk))
            return writer.finish()


class AsyncFiles:
    """The same on asyncio. Local files are read and written in threads."""

    def __init__(self, lease: AsyncConnectionLease, sandbox: str) -> None:
        self._lease = lease
        self._sandbox = sandbox

    async def read(self, path: RemotePath, *, user: str = "") -> str:
        """The whole file as UTF-8 text."""
        return _decoded(await self.read_bytes(path, user=user), path)

    async def read_bytes(
        self, path: RemotePath, *, user: str = "", offset: int = 0, length: int | None = None
    ) -> bytes:
        """The file, or ``length`` bytes from ``offset`` on. For large files use ``stream`` or ``download``."""
        return await self._lease.connection.send(calls.read_file(self._sandbox, path, user, offset, length))

    @asynccontextmanager
    async def stream(self, path: RemotePath, *, user: str = "") -> AsyncGenerator[AsyncIterator[bytes]]:
        """The file's bytes in pieces, as they come; an answer that breaks off raises."""
        operation = f"read {calls.shown_path(path)} in {self._sandbox}"
        address = calls.files_path(self._sandbox, path, user)
        async with self._lease.connection.open_stream(operation, "GET", address) as response:
            yield response.aiter_bytes()

    @asynccontextmanager
    async def stream_archive(self, path: RemotePath, *, user: str = "") -> AsyncGenerator[AsyncIterator[bytes]]:
        """A folder's content as a tar stream. Unpack it with care: the sandbox wrote it (``download_folder`` does)."""
        operation = f"copy the folder {calls.shown_path(path)} from {self._sandbox}"
        address = calls.files_path(self._sandbox, path, user, "/archive")
        async with self._lease.connection.open_stream(operation, "GET", address) as response:
            yield response.aiter_bytes()

    async def write(
        self, path: RemotePath, data: str | bytes | BinaryIO | AsyncIterable[bytes], *, user: str = ""
    ) -> FileEntry:
        """Write the whole file: text (as UTF-8), bytes, an open file or an async iterable, which are streamed."""
        if isinstance(data, str):
            data = data.encode("utf-8")
        if isinstance(data, bytes):
            return await self._lease.connection.send(calls.write_file(self._sandbox, path, user, data))
        if isinstance(data, AsyncIterable):
            return await self._lease.connection.send(calls.write_file(self._sandbox, path, user, None), content=data)
        return await self._send_file(path, data, user, None)

    async def _send_file(
        self, path: RemotePath, file: BinaryIO, user: str, on_progress: ProgressReporter | None
    ) -> FileEntry:
        call = calls.write_file(self._sandbox, path, user, None, size_of(file))
        return await self._lease.connection.send(call, content=_in_threads(read_pieces(file, on_progress)))

    async def stat(self, path: RemotePath, *, user: str = "") -> FileEntry:
        return await self._lease.connection.send(calls.stat_file(self._sandbox, path, user))

    async def exists(self, path: RemotePath, *, user: str = "") -> bool:
        try:
            await self.stat(path, user=user)
        except NotFoundError as error:
            if error.code == "sandbox_not_found":
                raise
            return False
        return True

    async def list(self, path: RemotePath = ".", *, user: str = "", depth: int = 1) -> list[FileEntry]:
        """What is in a folder, ``depth`` levels deep (1 to 64)."""
        return (await self._lease.connection.send(calls.list_directory(self._sandbox, path, user, depth))).items

    async def remove(self, path: RemotePath, *, user: str = "") -> None:
        """Remove a file, or a folder with all that is in it."""
        await self._lease.connection.send(calls.remove_file(self._sandbox, path, user))

    async def make_directory(self, path: RemotePath, *, user: str = "") -> FileEntry:
        """Make a folder and the folders above it. Raises ConflictError (``already_exists``) if it is there."""
        return await self._lease.connection.send(calls.make_directory(self._sandbox, path, user))

    async def move(self, source: RemotePath, destination: RemotePath, *, user: str = "") -> FileEntry:
        return await self._lease.connection.send(calls.move_file(self._sandbox, source, destination, user))

    async def upload(
        self, local: LocalPath, remote: RemotePath, *, user: str = "", on_progress: ProgressReporter | None = None
    ) -> FileEntry:
        """Copy one local file to ``remote`` (the file's own path there, no folder)."""
        with open_for_reading(Path(local)) as file:
            return await self._send_file(remote, file, user, on_progress)

    async def download(
        self, remote: RemotePath, local: LocalPath, *, user: str = "", on_progress: ProgressReporter | None = None
    ) -> None:
        """Copy one file to ``local`` (its own path here). It appears whole or not at all."""
        async with self.stream(remote, user=user) as chunks:
            with replace_file(Path(local)) as target:
                async for chunk in chunks:
                    await _to_thread(partial(_write_locally, target, chunk, local, on_progress))

    async def upload_folder(
        self, local: LocalPath, remote: RemotePath, *, user: str = "", on_progress: ProgressReporter | None = None
    ) -> PackReport:
        """Copy the content of a local folder into the folder ``remote``, which is made if absent."""
        report = PackReport()
        content = _in_threads(pack_folder(_source_folder(local), report, on_progress))
        await self._lease.connection.send(calls.write_archive(self._sandbox, remote, user), content=content)
        return report

    async def download_folder(
        self,
        remote: RemotePath,
        local: LocalPath,
        *,
        user: str = "",
        limits: UnpackLimits | None = None,
        on_progress: ProgressReporter | None = None,
    ) -> UnpackReport:
        """Copy the content of the folder ``remote`` into the local folder, which is made if absent.

        The sandbox is not trusted: see ``folder_writer`` for what is refused and what is left out.
        """
        async with self.stream_archive(remote, user=user) as chunks:
            with FolderWriter(_target_folder(local), limits) as writer:
                async for chunk in chunks:
                    await _to_thread(partial(writer.feed, chunk))
                    if on_progress is not None:
                        on_progress(len(chunk))
                return writer.finish()


async def _in_threads(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (piece := await _to_thread(lambda: next(pieces, None))) is not None:
        yield piece


async def _to_thread(work: Callable[[], T]) -> T:
    """As asyncio.to_thread, but a cancellation waits for the thread: what it works on is closed right afterwards."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what is reported
        raise
