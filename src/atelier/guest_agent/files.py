"""``GET``, ``HEAD`` and ``POST /files``: whole files, in big pieces.

Registered by the agent's ``__main__``. Done with the rights of the user named in the query or by Basic auth. An upload
appears under its name only when it is complete (``staged_file``). Instead of the token a signed URL is taken.
Source: E2B's envd HTTP API as its SDK 2.63 uses it; ranges by RFC 9110.
"""

from __future__ import annotations

import io
import os
import re
import stat
import time

# hmac.compare_digest itself, without hmac's import of OpenSSL.
from _operator import _compare_digest  # pyright: ignore[reportPrivateUsage]
from base64 import b64encode
from typing import Any, Final

from atelier.guest_agent.credentials import acting_as
from atelier.guest_agent.direct_reader import Take
from atelier.guest_agent.entries import describe, errors_about, set_metadata, show
from atelier.guest_agent.http import FilePart, HttpError, Request, Response, Router, json_response
from atelier.guest_agent.multipart import MultipartError, MultipartReader, PartBegins, PartBytes, header_parameters
from atelier.guest_agent.staged_file import StagedFile
from atelier.guest_agent.state import AgentState
from atelier.guest_agent.users import User

PIECE_BYTES: Final = 256 * 1024
PARTS_MAX: Final = 4096
_WHOLE_BYTES: Final = 64 * 1024
"""Up to this a file goes out together with the response's head."""
_SIZELESS_MAX_BYTES: Final = 4 * 1024 * 1024
_INFLATED_PIECE_BYTES: Final = 1024 * 1024
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_METADATA_HEADER: Final = "x-metadata-"
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def register(router: Router, state: AgentState) -> None:
    files = FileTransfer(state)
    # Public: the endpoints take a signature where a token is missing.
    router.add("GET", "/files", files.download, is_public=True)
    router.add("HEAD", "/files", files.download, is_public=True)
    router.add("POST", "/files", files.upload, is_public=True)


def signature_of(path: bytes, operation: str, user: bytes, token: str, expires: bytes | None) -> str:
    """The signature of a ``/files`` URL. ``operation``: ``read`` or ``write``; ``expires``: seconds since the epoch."""
    # Not at the top: loading OpenSSL takes a tenth of a second in an emulated guest.
    from hashlib import sha256

    words = [path, operation.encode(), user, token.encode()]
    if expires is not None:
        words.append(expires)
    return "v1_" + b64encode(sha256(b":".join(words)).digest()).rstrip(b"=").decode()


class FileTransfer:
    def __init__(self, state: AgentState) -> None:
        self._state = state

    def _authorize(self, request: Request, operation: str) -> None:
        signature = request.query_value("signature")
        if "x-access-token" in request.headers or signature is None or not self._state.token:
            self._state.authorize(request)
            return
        expires = request.query_value("signature_expiration")
        wanted = signature_of(
            request.query_value("path") or b"",
            operation,
            request.query_value("username") or b"",
            self._state.token,
            expires,
        )
        if not _compare_digest(signature, wanted.encode()):
            raise HttpError(401, "unauthenticated", "the URL's signature is wrong")
        if expires is not None and (not expires.isdigit() or len(expires) > 15 or int(expires) < time.time()):
            raise HttpError(401, "unauthenticated", "the URL's signature has expired")

    def _user(self, request: Request) -> User:
        return self._state.user_of(request, (request.query_value("username") or b"").decode(errors="replace"))

    # Download.

    async def download(self, request: Request) -> Response:
        self._authorize(request, "read")
        user = self._user(request)
        path = self._state.resolve(request.query_value("path") or b"", user)
        with errors_about("read", path), acting_as(user):
            # O_NONBLOCK: opening a pipe without a writer would stop the whole agent.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            file = io.FileIO(os.open(path, flags), "r")
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                file.close()
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise HttpError(400, "invalid_argument", f"cannot read {show(path)}: it is {kind}")
            if status.st_size == 0:
                # The files of /proc and /sys say nothing of their size, and may check rights at each read.
                with file:
                    return self._whole(request, path, _read_sizeless(file.fileno()))
        headers = _download_headers(path)
        size = status.st_size
        wished = _parse_range(request.headers.get("range"), size)
        if wished is None:
            first, length, code = 0, size, 200
        else:
            first, length, code = *wished, 206
            if length <= 0:
                file.close()
                return Response(416, {"content-range": f"bytes */{size}"})
            headers["content-range"] = f"bytes {first}-{first + length - 1}/{size}"
        headers["content-length"] = str(length)
        if request.method == "HEAD":
            file.close()
            return Response(code, headers)
        if length <= _WHOLE_BYTES:
            with file:
                return Response(code, headers, _read_exactly(file.fileno(), first, length))
        os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_SEQUENTIAL)
        return Response(code, headers, FilePart(file, first, length))

    @staticmethod
    def _whole(request: Request, path: bytes, content: bytes) -> Response:
        headers = _download_headers(path)
        headers["content-length"] = str(len(content))
        return Response(200, headers, b"" if request.method == "HEAD" else content)

    # Upload.

    async def upload(self, request: Request) -> Response:
        self._authorize(request, "write")
        user = self._user(request)
        content_type, parameters = header_parameters(request.headers.get("content-type", "").encode("latin-1"))
        upload = _Upload(self._state, user, _metadata(request))
        path = request.query_value("path")
        try:
            if content_type == b"multipart/form-data":
                await upload.receive_parts(request, parameters.get(b"boundary", b""), path)
            elif content_type == b"application/octet-stream":
                if not path:
                    raise HttpError(400, "invalid_argument", "the query names no path")
                await upload.receive_one(request, path)
            else:
                raise HttpError(
                    415, "invalid_argument", "a file is sent as multipart/form-data or application/octet-stream"
                )
            return json_response(upload.publish())
        finally:
            upload.discard()


def _download_headers(path: bytes) -> dict[str, str]:
    return {
        "content-type": "application/octet-stream",
        "accept-ranges": "bytes",
        "content-disposition": f"inline; filename*=UTF-8''{_percent_encoded(os.path.basename(path))}",
        "x-content-type-options": "nosniff",
    }


def _percent_encoded(name: bytes) -> str:
    return "".join(chr(byte) if chr(byte) in _UNRESERVED else f"%{byte:02X}" for byte in name)


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, length); a length <= 0 cannot be satisfied. None: no single range is asked for, so send it all."""
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first_text, last_text = match.groups()
    if not first_text:
        length = min(int(last_text), size)
        return size - length, length
    first = int(first_text)
    last = min(int(last_text), size - 1) if last_text else size - 1
    if last_text and int(last_text) < first:
        return None
    return first, last - first + 1


def _read_sizeless(descriptor: int) -> bytes:
    content = bytearray()
    while len(content) <= _SIZELESS_MAX_BYTES:
        piece = os.read(descriptor, PIECE_BYTES)
        if not piece:
            return bytes(content)
        content += piece
    raise HttpError(413, "resource_exhausted", "a file without a size is read up to 4 MiB only")


def _read_exactly(descriptor: int, first: int, length: int) -> bytes:
    content = os.pread(descriptor, length, first)
    if len(content) < length:
        raise HttpError(409, "aborted", "the file became shorter while it was read")
    return content


def _metadata(request: Request) -> dict[str, str]:
    return {
        name[len(_METADATA_HEADER) :]: value
        for name, value in request.headers.items()
        if name.startswith(_METADATA_HEADER)
    }


def _write_all(descriptor: int, piece: memoryview) -> None:
    written = os.write(descriptor, piece)
    while written < len(piece):
        written += os.write(descriptor, piece[written:])


class _Upload:
    """The files of one request. Nothing appears before ``publish``; ``discard`` drops what was not published."""

    def __init__(self, state: AgentState, user: User, metadata: dict[str, str]) -> None:
        self._state = state
        self._user = user
        self._metadata = metadata
        self._staged: list[StagedFile] = []

    async def receive_one(self, request: Request, path: bytes) -> None:
        staged = self._begin(path)
        descriptor = staged.descriptor
        with errors_about("write", staged.path):
            self._check_room(staged, request)
            await _pour_decoded(request, lambda piece: _write_all(descriptor, piece))
            self._complete(staged)

    async def receive_parts(self, request: Request, boundary: bytes, path: bytes | None) -> None:
        """``path`` names the only file; without it each part's file name is a path, relative ones from the home."""
        staged: StagedFile | None = None
        try:
            reader = MultipartReader(boundary)

            def take(piece: memoryview) -> None:
                nonlocal staged
                for event in reader.feed(piece):
                    if isinstance(event, PartBegins):
                        staged = self._begin_part(event, path)
                    elif staged is not None:
                        with errors_about("write", staged.path):
                            if isinstance(event, PartBytes):
                                _write_all(staged.descriptor, event.content)
                            else:
                                self._complete(staged)

            await _pour_decoded(request, take)
            reader.finish()
        except MultipartError as error:
            raise HttpError(400, "invalid_argument", f"the multipart body is broken: {error}") from error
        if not self._staged:
            raise HttpError(400, "invalid_argument", "the multipart body holds no file")

    def _begin_part(self, part: PartBegins, path: bytes | None) -> StagedFile | None:
        if part.name != b"file" or part.filename is None:
            return None
        if path and self._staged:
            raise HttpError(400, "invalid_argument", "one path is named, but more than one file is sent")
        if len(self._staged) >= PARTS_MAX:
            raise HttpError(413, "resource_exhausted", f"more than {PARTS_MAX} files in one request")
        name = path or part.filename
        if not name:
            raise HttpError(400, "invalid_argument", "a file without a path")
        return self._begin(name)

    def _begin(self, path: bytes) -> StagedFile:
        target = self._state.resolve(path, self._user)
        with errors_about("write", target), acting_as(self._user):
            staged = StagedFile.open(target)
        self._staged.append(staged)
        return staged

    def _check_room(self, staged: StagedFile, request: Request) -> None:
        """Refuse at once what cannot fit, instead of at the end of a long upload."""
        length = request.headers.get("content-length", "")
        if not length.isdigit():
            return
        system = os.fstatvfs(staged.descriptor)
        # f_bavail leaves out what is kept for root.
        room = system.f_frsize * (system.f_bfree if self._user.uid == 0 else system.f_bavail)
        if int(length) > room:
            raise HttpError(
                507, "resource_exhausted", f"cannot write {show(staged.path)}: {length} bytes, {room} are free"
            )

    def _complete(self, staged: StagedFile) -> None:
        with acting_as(self._user):
            if self._metadata:
                set_metadata(staged.descriptor, self._metadata)
            staged.give_name()

    def publish(self) -> list[dict[str, Any]]:
        """Put all files in place; the answer's body. ``entry`` (``filesystem.EntryInfo``) is ours."""
        answer: list[dict[str, Any]] = []
        for staged in self._staged:
            with errors_about("write", staged.path), acting_as(self._user):
                staged.publish()
                entry = describe(staged.path, self._state.users)
            written = {"name": entry["name"], "path": entry["path"], "type": "file", "entry": entry}
            if "metadata" in entry:
                written["metadata"] = entry["metadata"]
            answer.append(written)
        return answer

    def discard(self) -> None:
        with acting_as(self._user):
            for staged in self._staged:
                staged.discard()


async def _pour_decoded(request: Request, take: Take) -> None:
    """Hand the body to ``take``, inflated if it is sent gzipped."""
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding == "identity":
        await request.pour(take)
        return
    if coding != "gzip":
        raise HttpError(415, "invalid_argument", f"content-encoding {coding[:40]!r} is not known here, gzip is")
    import zlib

    inflate = zlib.decompressobj(wbits=31)

    def take_gzip(piece: memoryview) -> None:
        rest: bytes | memoryview = piece
        while rest and not inflate.eof:
            take(memoryview(inflate.decompress(rest, _INFLATED_PIECE_BYTES)))
            rest = inflate.unconsumed_tail

    try:
        await request.pour(take_gzip)
    except zlib.error as error:
        raise HttpError(400, "invalid_argument", "the body is no gzip stream") from error
    if not inflate.eof:
        raise HttpError(400, "invalid_argument", "the gzip stream ends too early")
