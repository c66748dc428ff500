"""Reads what a guest says. Every byte from a guest is hostile: sizes, depths, counts and ranges are bounded here.

Used by ``agent``, and ``terminal_messages`` on top of it. Turns the guest protocol's JSON into the values of ``model.guest``; whatever does not fit raises
GuestProtocolError. Does no input or output but reading the response it is given.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterable, AsyncIterator
from datetime import UTC, datetime
from typing import Any, Final, cast

from atelier.guest_protocol import connect
from atelier.model.errors import (
    AccessDeniedError,
    AtelierError,
    ConflictError,
    GuestError,
    GuestProtocolError,
    GuestUnreachableError,
    InvalidRequestError,
    NotFoundError,
    TimeoutExceededError,
)
from atelier.model.guest import (
    EntryType,
    FileEntry,
    GuestMetrics,
    ProcessEnded,
    ProcessEvent,
    ProcessOutput,
    ProcessSpec,
    ProcessStarted,
    ProcessSummary,
    TerminalSize,
)

MESSAGE_MAX_BYTES: Final = connect.MAX_MESSAGE_BYTES
ERROR_MAX_BYTES: Final = 64 * 1024
GAVE_UP: Final = "guest_gave_up"
"""The code of a GuestError: the guest began what it was asked for, and undid it."""
_ERROR_TEXT_MAX: Final = 500
_PROCESSES_MAX: Final = 100_000
_ARGUMENTS_MAX: Final = 100_000
_ENTRIES_MAX: Final = 100_000
_PORTS_MAX: Final = 4096
_INT64_MAX: Final = 2**63 - 1

Message = dict[str, Any]


async def read_bounded(chunks: AsyncIterable[bytes], limit_bytes: int) -> bytes:
    """The whole body; raises GuestProtocolError beyond ``limit_bytes``."""
    pieces: list[bytes] = []
    total = 0
    async for chunk in chunks:
        total += len(chunk)
        if total > limit_bytes:
            raise GuestProtocolError(f"the guest sent an answer of more than {limit_bytes} bytes")
        pieces.append(chunk)
    return b"".join(pieces)


def parse_message(text: bytes) -> Message:
    """A JSON object. Deep nesting, endless numbers and bad UTF-8 raise GuestProtocolError like any other nonsense."""
    try:
        return connect.decode_json(text)
    except connect.ConnectError as error:
        raise GuestProtocolError(f"the guest sent no proper JSON: {plain(error.message)}") from error


def parse_list(text: bytes, count: int) -> list[Message]:
    """A JSON list of ``count`` objects (the answer to an upload)."""
    items = as_list(parse_message(b'{"items":' + text + b"}").get("items"), "the answer", count)
    if len(items) != count:
        raise protocol_error(f"{len(items)} items where {count} belong")
    return [as_object(item, "an item") for item in items]


def protocol_error(what: str) -> GuestProtocolError:
    return GuestProtocolError(f"the guest's answer breaks the protocol: {what}")


def as_object(value: object, name: str) -> Message:
    if not isinstance(value, dict):
        raise protocol_error(f"{name} is no object")
    return cast(Message, value)


def as_list(value: object, name: str, limit: int) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise protocol_error(f"{name} is no list")
    items = cast("list[Any]", value)
    if len(items) > limit:
        raise protocol_error(f"{name} has {len(items)} items, {limit} are allowed")
    return items


def as_text(value: object, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise protocol_error(f"{name} is no text")
    try:
        # A lone surrogate can be written in JSON but can be passed on to nobody.
        value.encode()
    except UnicodeEncodeError as error:
        raise protocol_error(f"{name} is no Unicode text") from error
    return value


def as_integer(value: object, name: str, minimum: int = 0, maximum: int = _INT64_MAX) -> int:
    """An integer; protobuf's JSON writes those of 64 bits as strings, and leaves zeros out."""
    if value is None:
        value = 0
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError as error:
            raise protocol_error(f"{name} is no number") from error
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise protocol_error(f"{name} is no number from {minimum} to {maximum}")
    return value


def _number(value: object, name: str, maximum: float) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= maximum:
        raise protocol_error(f"{name} is no number from 0 to {maximum:g}")
    return float(value)


def _bytes(value: object, name: str) -> bytes:
    try:
        return base64.b64decode(as_text(value, name), validate=True)
    except (binascii.Error, ValueError) as error:
        raise protocol_error(f"{name} is no base64") from error


def plain(text: str) -> str:
    """A guest's words for a person: one line, no control characters, 500 characters at most."""
    return "".join(character if character.isprintable() else " " for character in text[:_ERROR_TEXT_MAX]).strip()


# What is asked of a guest.


def start_message(spec: ProcessSpec) -> Message:
    """``process.StartRequest``, without its tag."""
    message: Message = {
        "process": {
            "cmd": spec.arguments[0],
            "args": list(spec.arguments[1:]),
            "envs": spec.environment,
            "cwd": spec.working_directory,
        },
        "stdin": spec.stdin,
    }
    if spec.terminal is not None:
        message["pty"] = {"size": size_message(spec.terminal)}
    return message


def size_message(size: TerminalSize) -> Message:
    return {"cols": size.columns, "rows": size.rows}


# Errors.

_CODE_OF_STATUS: Final = {
    400: "invalid_argument",
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    405: "unimplemented",
    409: "already_exists",
    412: "failed_precondition",
    413: "resource_exhausted",
    429: "resource_exhausted",
    503: "unavailable",
    504: "deadline_exceeded",
    507: "resource_exhausted",
}


def error_from(code: str, message: str, *, absent: str) -> AtelierError:
    """``code`` is one of the Connect protocol's; ``absent`` is the code of a NotFoundError."""
    text = plain(message) or code
    match code:
        case "not_found":
            return NotFoundError(text, code=absent)
        case "permission_denied":
            return AccessDeniedError(text, code="permission_denied")
        case "invalid_argument" | "out_of_range":
            return InvalidRequestError(text)
        case "already_exists":
            return ConflictError(text, code="already_exists")
        case "resource_exhausted":
            return GuestError(
                text,
                code="guest_resource_exhausted",
                hint="free disk or memory inside the sandbox, or close what is open there",
            )
        case "deadline_exceeded":
            return TimeoutExceededError(text)
        case "unavailable":
            return GuestUnreachableError(text)
        case "aborted":
            return GuestError(text, code=GAVE_UP)
        case "unauthenticated":
            return GuestError(
                f"the guest does not take this manager's token: {text}",
                code="guest_refused_token",
                hint="destroy the sandbox; its guest agent was given another token",
            )
        case _:
            return GuestError(text)


def error_of_response(status: int, body: bytes, *, absent: str) -> AtelierError:
    """The error that an answer other than 2xx means. Its body is ``{"code", "message"}``, or anything at all."""
    code, message = "", ""
    try:
        parsed = parse_message(body)
        message = as_text(parsed.get("message"), "message")
        if isinstance(parsed.get("code"), str):
            code = parsed["code"]
    except GuestProtocolError:
        message = ""
    return error_from(
        code or _CODE_OF_STATUS.get(status, "unknown"), message or f"the guest answered {status}", absent=absent
    )


# Streams.


async def read_frames(chunks: AsyncIterable[bytes], *, absent: str) -> AsyncIterator[Message]:
    """The messages of a Connect stream, up to its end frame. An error in that frame is raised; a stream that ends
    without one raises GuestUnreachableError. Source: connectrpc.com/docs/protocol."""
    reader = connect.EnvelopeReader(MESSAGE_MAX_BYTES)
    async for chunk in chunks:
        try:
            for flags, payload in reader.feed(chunk):
                if flags & connect.FLAG_END_STREAM:
                    failure = connect.parse_end_stream(payload)
                    if failure is not None:
                        raise error_from(failure.code, failure.message, absent=absent)
                    return
                yield parse_message(payload)
        except connect.ConnectError as error:
            raise protocol_error(plain(error.message)) from error
    raise GuestUnreachableError("the guest's stream was cut off")


def process_event(message: Message) -> ProcessEvent | None:
    """``process.StartResponse`` and ``ConnectResponse``; None for what says nothing (a keep-alive)."""
    event = as_object(message.get("event", {}), "event")
    if "start" in event:
        return ProcessStarted(as_integer(as_object(event["start"], "start").get("pid"), "pid", 1, 2**22))
    if "data" in event:
        return process_output(as_object(event["data"], "data"))
    if "end" in event:
        return process_ended(as_object(event["end"], "end"))
    return None


def process_output(data: Message) -> ProcessOutput | None:
    """``process.DataEvent``; None for a stream that nobody knows."""
    for stream in ("stdout", "stderr", "pty"):
        if stream in data:
            return ProcessOutput(stream, _bytes(data[stream], stream))
    return None


def process_ended(end: Message) -> ProcessEnded:
    """``process.EndEvent``."""
    number = as_integer(end.get("signal"), "signal", 0, 64)
    status = plain(as_text(end.get("status"), "status"))
    error = plain(as_text(end.get("error"), "error"))
    return ProcessEnded(
        exit_code=128 + number if number else as_integer(end.get("exitCode"), "exitCode", 0, 255),
        status=status,
        # E2B repeats the status there; only what it does not say is told.
        error="" if error == status else error,
    )


def process_command(config: Message) -> tuple[str, ...]:
    """Program and arguments of a ``process.ProcessConfig``."""
    arguments = as_list(config.get("args"), "args", _ARGUMENTS_MAX)
    return as_text(config.get("cmd"), "cmd"), *(as_text(argument, "argument") for argument in arguments)


def process_summaries(message: Message) -> list[ProcessSummary]:
    """``process.ListResponse``."""
    summaries: list[ProcessSummary] = []
    for item in as_list(message.get("processes"), "processes", _PROCESSES_MAX):
        process = as_object(item, "process")
        config = as_object(process.get("config", {}), "config")
        summaries.append(
            ProcessSummary(
                as_integer(process.get("pid"), "pid", 1, 2**22),
                as_text(process.get("tag"), "tag"),
                process_command(config),
                as_text(config.get("cwd"), "cwd"),
                process.get("terminal") is True,
            )
        )
    return summaries


# Files.

_ENTRY_TYPES: Final = {
    "FILE_TYPE_FILE": EntryType.FILE,
    "FILE_TYPE_DIRECTORY": EntryType.DIRECTORY,
    "FILE_TYPE_SYMLINK": EntryType.SYMLINK,
}


def file_entry(value: object) -> FileEntry:
    """``filesystem.EntryInfo``."""
    entry = as_object(value, "entry")
    path = as_text(entry.get("path"), "path")
    raw_path = _bytes(entry["pathBytes"], "pathBytes") if "pathBytes" in entry else path.encode()
    if not raw_path.startswith(b"/") or b"\0" in raw_path:
        raise protocol_error("a path that is not absolute")
    entry_type = _ENTRY_TYPES.get(as_text(entry.get("type"), "type"), EntryType.OTHER)
    return FileEntry(
        name=as_text(entry.get("name"), "name"),
        path=path,
        raw_path=raw_path,
        type=EntryType.SYMLINK if entry.get("isSymlink") is True else entry_type,
        size_bytes=as_integer(entry.get("size"), "size"),
        mode=as_integer(entry.get("mode"), "mode", 0, 2**32 - 1) & 0o7777,
        owner=as_text(entry.get("owner"), "owner"),
        group=as_text(entry.get("group"), "group"),
        modified_at=_moment(entry.get("modifiedTime")),
        symlink_target=as_text(entry.get("symlinkTarget"), "symlinkTarget"),
    )


def _moment(value: object) -> datetime:
    text = as_text(value, "modifiedTime")
    try:
        moment = datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)
    except ValueError as error:
        raise protocol_error("modifiedTime is no time") from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def file_entries(message: Message) -> list[FileEntry]:
    """``filesystem.ListDirResponse``. An entry's name cannot lead elsewhere: ``.`` and ``..`` are refused, also within
    a path, so that who copies a folder out of a guest can rely on it."""
    entries = [file_entry(item) for item in as_list(message.get("entries"), "entries", _ENTRIES_MAX)]
    for entry in entries:
        if not {b"", b".", b".."}.isdisjoint(entry.raw_path[1:].split(b"/")):
            raise protocol_error("a path that leads elsewhere")
    return entries


def next_page(message: Message) -> str:
    return as_text(message.get("nextPage"), "nextPage")


# The guest as a whole.


def clock_time_ns(message: Message) -> int:
    """``atelier.v1.Control/SetClock``: the guest's wall clock, ns since the epoch."""
    return as_integer(message.get("timeNs"), "timeNs")


def port_numbers(message: Message) -> list[int]:
    """The answer to ``GET /ports``; sorted."""
    ports: object = message.get("ports")
    if not isinstance(ports, list):
        raise protocol_error("ports is no list")
    numbers = cast("list[object]", ports)
    if len(numbers) > _PORTS_MAX:
        raise protocol_error(f"more than {_PORTS_MAX} ports")
    return sorted({as_integer(each, "a port", 1, 65_535) for each in numbers})


def metrics(message: Message) -> GuestMetrics:
    """The answer to ``GET /metrics``."""
    return GuestMetrics(
        cpu_count=as_integer(message.get("cpu_count"), "cpu_count", 0, 65_536),
        cpu_used_percent=_number(message.get("cpu_used_pct"), "cpu_used_pct", 100.0),
        memory_total_bytes=as_integer(message.get("mem_total"), "mem_total"),
        memory_used_bytes=as_integer(message.get("mem_used"), "mem_used"),
        disk_total_bytes=as_integer(message.get("disk_total"), "disk_total"),
        disk_used_bytes=as_integer(message.get("disk_used"), "disk_used"),
        uptime_seconds=_number(message.get("uptime_seconds"), "uptime_seconds", 1e12),
    )
