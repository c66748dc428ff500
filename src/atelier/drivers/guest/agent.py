"""The real guest driver: speaks the guest protocol with the guest agent of each sandbox, over its guest channel.

Made by ``manager.wiring``. The channel's host side is the gateway's; this asks it to attach and detach, and then opens
the unix socket that the gateway offers. Holds no state that outlives it but the tokens given by ``ensure_channel`` and
``initialize``. It never trusts a guest: see ``messages``.
"""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

from atelier.drivers.guest.channel_connection import in_big_pieces
from atelier.drivers.guest.control_calls import (
    initialize,
    quiesce,
    rename,
    shut_down,
    synchronize_clock,
    thaw,
    wait_ready,
)
from atelier.drivers.guest.event_streams import open_events
from atelier.drivers.guest.gateway_control import GatewayControl
from atelier.drivers.guest.guest_http import STALL_SECONDS, GuestHttp, basic_user, body_of, header
from atelier.drivers.guest.messages import (
    MESSAGE_MAX_BYTES,
    Message,
    file_entries,
    file_entry,
    metrics,
    next_page,
    parse_list,
    port_numbers,
    process_event,
    process_summaries,
    read_bounded,
    size_message,
    start_message,
)
from atelier.drivers.guest.terminals import AgentTerminals
from atelier.model.errors import GuestError, GuestProtocolError, HostError, InvalidRequestError
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

_PIECE_BYTES: Final = 256 * 1024
_INPUT_PIECE_BYTES: Final = 1024 * 1024
_LIST_PAGE_BYTES: Final = 1024 * 1024
_LIST_MAX_ENTRIES: Final = 100_000
_LIST_MAX_PAGES: Final = 1_000
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_UNSATISFIED_RANGE: Final = re.compile(r"bytes \*/(\d{1,18})")

_FILES: Final = "filesystem.Filesystem/"
_PROCESSES: Final = "process.Process/"
_NO_PATH: Final = "path_not_found"
_NO_PROCESS: Final = "process_not_found"
_NO_PROGRAM: Final = "program_not_found"


class AgentGuests:
    """GuestDriver over the gateway. ``channel_socket`` tells where a sandbox's channel is offered,
    ``gateway_socket`` is the gateway's control socket."""

    def __init__(self, channel_socket: Callable[[str], Path], gateway_socket: Path) -> None:
        self._channel_socket = channel_socket
        self._gateway = GatewayControl(gateway_socket)
        self._guests: dict[str, GuestHttp] = {}
        self.terminals = AgentTerminals(self._guest)

    def _guest(self, sandbox_id: str) -> GuestHttp:
        guest = self._guests.get(sandbox_id)
        if guest is None:
            guest = self._guests[sandbox_id] = GuestHttp(sandbox_id, self._channel_socket(sandbox_id))
        return guest

    async def close(self) -> None:
        """Let go of all connections."""
        guests, self._guests = self._guests, {}
        for guest in guests.values():
            await guest.close()

    # The channel.

    async def ensure_channel(self, sandbox_id: str, endpoint: GuestEndpoint, token: str) -> None:
        if endpoint.kind == "fake":
            raise HostError(f"a guest channel of kind {endpoint.kind} is not offered by the gateway")
        await self._gateway.attach(sandbox_id, endpoint, token)
        self._guest(sandbox_id).token = token

    async def ensure_channel_absent(self, sandbox_id: str) -> None:
        guest = self._guests.pop(sandbox_id, None)
        if guest is not None:
            await guest.close()
        await self._gateway.detach(sandbox_id)

    async def list_channels(self) -> list[str]:
        return sorted(await self._gateway.list_attached())

    # The guest as a whole.

    async def wait_ready(self, sandbox_id: str, timeout_seconds: float) -> None:
        await wait_ready(self._guest(sandbox_id), sandbox_id, timeout_seconds)

    async def initialize(self, sandbox_id: str, identity: GuestIdentity) -> None:
        await initialize(self._guest(sandbox_id), identity)

    async def rename(self, sandbox_id: str, hostname: str, environment: dict[str, str]) -> None:
        await rename(self._guest(sandbox_id), hostname, environment)

    async def quiesce(self, sandbox_id: str) -> None:
        await quiesce(self._guest(sandbox_id))

    async def thaw(self, sandbox_id: str) -> None:
        await thaw(self._guest(sandbox_id))

    async def synchronize_clock(self, sandbox_id: str) -> float:
        return await synchronize_clock(self._guest(sandbox_id))

    async def shut_down(self, sandbox_id: str) -> None:
        await shut_down(self._guest(sandbox_id))

    async def metrics(self, sandbox_id: str) -> GuestMetrics:
        return metrics(await self._guest(sandbox_id).ask("reading the metrics", "GET", "/metrics", is_question=True))

    async def list_ports(self, sandbox_id: str) -> list[int]:
        return port_numbers(await self._guest(sandbox_id).ask("listing the ports", "GET", "/ports", is_question=True))

    # Processes.

    def _process_stream(
        self,
        sandbox_id: str,
        what: str,
        procedure: str,
        message: Message,
        user: str,
        timeout_seconds: float | None,
        absent: str,
    ) -> AbstractAsyncContextManager[AsyncIterator[ProcessEvent]]:
        headers = basic_user(user)
        if timeout_seconds is not None:
            headers["connect-timeout-ms"] = str(max(1, round(timeout_seconds * 1000)))
        guest = self._guest(sandbox_id)
        return open_events(guest, what, _PROCESSES + procedure, message, process_event, headers=headers, absent=absent)

    def start_process(
        self, sandbox_id: str, spec: ProcessSpec
    ) -> AbstractAsyncContextManager[AsyncIterator[ProcessEvent]]:
        if not spec.arguments:
            raise InvalidRequestError("a process needs a program to run")
        message = start_message(spec)
        if spec.tag:
            message["tag"] = spec.tag
        return self._process_stream(
            sandbox_id, f"starting {spec.arguments[0]}", "Start", message, spec.user, spec.timeout_seconds, _NO_PROGRAM
        )

    def connect_process(self, sandbox_id: str, pid: int) -> AbstractAsyncContextManager[AsyncIterator[ProcessEvent]]:
        return self._process_stream(
            sandbox_id, f"connecting to process {pid}", "Connect", _selector(pid), "", None, _NO_PROCESS
        )

    async def list_processes(self, sandbox_id: str) -> list[ProcessSummary]:
        return process_summaries(
            await self._process_call(sandbox_id, "listing processes", "List", {}, is_question=True)
        )

    async def send_input(self, sandbox_id: str, pid: int, data: bytes, *, terminal: bool = False) -> None:
        for start in range(0, len(data), _INPUT_PIECE_BYTES):
            piece = base64.b64encode(data[start : start + _INPUT_PIECE_BYTES]).decode()
            await self._process_call(
                sandbox_id,
                f"sending input to process {pid}",
                "SendInput",
                {**_selector(pid), "input": {"pty" if terminal else "stdin": piece}},
            )

    async def close_input(self, sandbox_id: str, pid: int) -> None:
        await self._process_call(sandbox_id, f"closing the input of process {pid}", "CloseStdin", _selector(pid))

    async def send_signal(self, sandbox_id: str, pid: int, signal_number: int) -> None:
        await self._process_call(
            sandbox_id,
            f"sending signal {signal_number} to process {pid}",
            "SendSignal",
            {**_selector(pid), "signal": signal_number},
        )

    async def resize_terminal(self, sandbox_id: str, pid: int, size: TerminalSize) -> None:
        await self._process_call(
            sandbox_id,
            f"resizing the terminal of process {pid}",
            "Update",
            {**_selector(pid), "pty": {"size": size_message(size)}},
        )

    async def _process_call(
        self, sandbox_id: str, what: str, procedure: str, message: Message, *, is_question: bool = False
    ) -> Message:
        return await self._guest(sandbox_id).call(
            what, _PROCESSES + procedure, message, absent=_NO_PROCESS, is_question=is_question
        )

    # Files.

    async def _file_call(
        self, sandbox_id: str, verb: str, path: bytes, procedure: str, message: Message, user: str, **options: bool
    ) -> Message:
        what = f"{verb} {path.decode(errors='replace')}"
        return await self._guest(sandbox_id).call(
            what, _FILES + procedure, message, user=user, absent=_NO_PATH, **options
        )

    async def stat(self, sandbox_id: str, path: bytes, user: str = "") -> FileEntry:
        answer = await self._file_call(
            sandbox_id, "reading", path, "Stat", _path_fields("path", path), user, is_question=True
        )
        return file_entry(answer.get("entry"))

    async def list_directory(self, sandbox_id: str, path: bytes, user: str = "", depth: int = 1) -> list[FileEntry]:
        entries: list[FileEntry] = []
        request: Message = {**_path_fields("path", path), "depth": depth, "pageBytes": _LIST_PAGE_BYTES}
        for _ in range(_LIST_MAX_PAGES):
            answer = await self._file_call(sandbox_id, "listing", path, "ListDir", request, user, is_question=True)
            entries += file_entries(answer)
            after = next_page(answer)
            if not after:
                return entries
            if len(entries) > _LIST_MAX_ENTRIES:
                break
            request["pageAfter"] = after
        raise GuestError(
            f"{path.decode(errors='replace')} in sandbox {sandbox_id} holds more than {_LIST_MAX_ENTRIES} entries",
            code="listing_too_large",
            hint="list a folder below it, or with less depth",
        )

    async def make_directory(self, sandbox_id: str, path: bytes, user: str = "") -> FileEntry:
        answer = await self._file_call(
            sandbox_id, "making the folder", path, "MakeDir", _path_fields("path", path), user
        )
        return file_entry(answer.get("entry"))

    async def move(self, sandbox_id: str, source: bytes, destination: bytes, user: str = "") -> FileEntry:
        fields = {**_path_fields("source", source), **_path_fields("destination", destination)}
        return file_entry((await self._file_call(sandbox_id, "moving", source, "Move", fields, user)).get("entry"))

    async def remove(self, sandbox_id: str, path: bytes, user: str = "") -> None:
        await self._file_call(sandbox_id, "removing", path, "Remove", _path_fields("path", path), user)

    @asynccontextmanager
    async def read_file(
        self, sandbox_id: str, path: bytes, user: str = "", *, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[tuple[int, AsyncIterator[bytes]]]:
        if length == 0:
            # HTTP has no empty range.
            yield await self._file_size(sandbox_id, path, user), _nothing()
            return
        headers: dict[str, str] = {}
        if offset or length is not None:
            headers["range"] = f"bytes={offset}-{offset + length - 1 if length is not None else ''}"
        async with self._guest(sandbox_id).open(
            f"reading {path.decode(errors='replace')}",
            "GET",
            _file_target("/files", path, user),
            headers=headers,
            absent=_NO_PATH,
            expected=(200, 206, 416),
        ) as response:
            if response.status == 416:
                beyond = _UNSATISFIED_RANGE.fullmatch(header(response, "content-range"))
                if beyond is None:
                    raise GuestProtocolError("the guest does not say how long the file is")
                yield int(beyond[1]), _nothing()
            elif response.status == 206:
                total, wanted = _checked_range(header(response, "content-range"), offset, length)
                yield total, _exactly(body_of(response), wanted)
            else:
                total = _content_length(header(response, "content-length"))
                # A file without a known size (those of /proc) is sent whole, whatever was asked for.
                yield total, _part_of(body_of(response), offset, total if length is None else length)

    async def _file_size(self, sandbox_id: str, path: bytes, user: str) -> int:
        async with self._guest(sandbox_id).open(
            f"reading {path.decode(errors='replace')}", "HEAD", _file_target("/files", path, user), absent=_NO_PATH
        ) as response:
            return _content_length(header(response, "content-length"))

    async def write_file(self, sandbox_id: str, path: bytes, chunks: AsyncIterator[bytes], user: str = "") -> FileEntry:
        async with self._guest(sandbox_id).open(
            f"writing {path.decode(errors='replace')}",
            "POST",
            _file_target("/files", path, user),
            headers={"content-type": "application/octet-stream"},
            body=in_big_pieces(chunks, _PIECE_BYTES),
            absent=_NO_PATH,
            answer_seconds=None,
        ) as response:
            [written] = parse_list(await read_bounded(body_of(response), MESSAGE_MAX_BYTES), 1)
            return file_entry(written.get("entry"))

    @asynccontextmanager
    async def read_archive(self, sandbox_id: str, path: bytes, user: str = "") -> AsyncGenerator[AsyncIterator[bytes]]:
        async with self._guest(sandbox_id).open(
            f"packing {path.decode(errors='replace')}", "GET", _file_target("/archive", path, user), absent=_NO_PATH
        ) as response:
            yield body_of(response)

    async def write_archive(self, sandbox_id: str, path: bytes, chunks: AsyncIterator[bytes], user: str = "") -> None:
        async with self._guest(sandbox_id).open(
            f"unpacking into {path.decode(errors='replace')}",
            "POST",
            _file_target("/archive", path, user),
            headers={"content-type": "application/x-tar"},
            body=in_big_pieces(chunks, _PIECE_BYTES),
            absent=_NO_PATH,
            answer_seconds=None,
            stall_seconds=2 * STALL_SECONDS,
        ) as response:
            await read_bounded(body_of(response), MESSAGE_MAX_BYTES)


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _exactly(chunks: AsyncIterator[bytes], wanted: int) -> AsyncIterator[bytes]:
    got = 0
    async for chunk in chunks:
        got += len(chunk)
        if got > wanted:
            break
        yield chunk
    if got != wanted:
        raise GuestProtocolError(f"the guest promised {wanted} bytes and sent {'more' if got > wanted else got}")


async def _part_of(chunks: AsyncIterator[bytes], offset: int, length: int) -> AsyncIterator[bytes]:
    """Bytes ``offset`` to ``offset + length`` of all of them."""
    end, position = offset + length, 0
    async for chunk in chunks:
        piece = chunk[max(0, offset - position) : max(0, end - position)]
        position += len(chunk)
        if piece:
            yield piece


def _content_length(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise GuestProtocolError("the guest does not say how long the file is")
    return int(text)


def _checked_range(text: str, offset: int, length: int | None) -> tuple[int, int]:
    """(total size, bytes to come) of a Content-Range that answers what was asked for."""
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        raise GuestProtocolError("the guest's Content-Range is malformed")
    first, last, total = (int(number) for number in match.groups())
    wanted_last = total - 1 if length is None else min(offset + length, total) - 1
    if first != offset or last != wanted_last or last < first:
        raise GuestProtocolError("the guest sends another range than it was asked for")
    return total, last - first + 1


def _file_target(route: str, path: bytes, user: str) -> str:
    query: dict[str, str | bytes] = {"path": path}
    if user:
        query["username"] = user
    return f"{route}?{urlencode(query)}"


def _path_fields(name: str, path: bytes) -> Message:
    try:
        return {name: path.decode()}
    except UnicodeDecodeError:
        return {name + "Bytes": base64.b64encode(path).decode()}


def _selector(pid: int) -> Message:
    return {"process": {"pid": pid}}
