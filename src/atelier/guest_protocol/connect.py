"""The Connect protocol in its JSON form: envelopes, error codes, bounded JSON. Pure, no I/O, usable by host and guest.

A unary call is a POST of ``application/json``. A streaming one is ``application/connect+json``: envelopes of one flag
byte, a 4-byte big-endian length and that many bytes of JSON, ended by one with ``FLAG_END_STREAM``. The other side is
never trusted: every length is checked before a byte of it is kept, JSON may be nested MAX_JSON_DEPTH deep only and
hold MAX_JSON_ITEMS values (each takes up to 50 times its text in memory), and no check takes more than linear time.
Source: https://connectrpc.com/docs/protocol (Connect protocol, version 1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

CONTENT_TYPE_UNARY: Final = "application/json"
CONTENT_TYPE_STREAM: Final = "application/connect+json"

HEADER_BYTES: Final = 5
FLAG_COMPRESSED: Final = 0x01
FLAG_END_STREAM: Final = 0x02

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""The longest JSON message that either side takes, unless a caller sets a smaller bound."""
MAX_JSON_DEPTH: Final = 32
"""E2B's deepest message has 6 levels."""
MAX_JSON_ITEMS: Final = 250_000
"""A long page of a listing has a third of it."""

HTTP_STATUS_OF_CODE: Final[dict[str, int]] = {
    "canceled": 499,
    "unknown": 500,
    "invalid_argument": 400,
    "deadline_exceeded": 504,
    "not_found": 404,
    "already_exists": 409,
    "permission_denied": 403,
    "resource_exhausted": 429,
    "failed_precondition": 400,
    "aborted": 409,
    "out_of_range": 400,
    "unimplemented": 501,
    "internal": 500,
    "unavailable": 503,
    "data_loss": 500,
    "unauthenticated": 401,
}
"""Every Connect error code with the status of a unary answer that carries it."""

_CODE_OF_HTTP_STATUS: Final[dict[int, str]] = {
    400: "internal",
    401: "unauthenticated",
    403: "permission_denied",
    404: "unimplemented",
    429: "unavailable",
    502: "unavailable",
    503: "unavailable",
    504: "unavailable",
}

_MAX_ERROR_TEXT: Final = 4096
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""Possessive, and what is never closed goes to the end: looking for the end of each string again would take hours."""
_ITEM_MARKS = (b",", b"[", b"{")
_ALL_BUT_BRACKETS = bytes(value for value in range(256) if value not in b"[]{}")


class ConnectError(Exception):
    """A call failed: ``code`` is one of HTTP_STATUS_OF_CODE, ``message`` is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def status(self) -> int:
        """The HTTP status of a unary answer with this error."""
        return HTTP_STATUS_OF_CODE.get(self.code, 500)


def encode_json(message: object) -> bytes:
    """``message`` as compact JSON; what no UTF-8 can hold (lone surrogates) is written as an escape."""
    return _ENCODER.encode(message).encode()


def decode_json(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The object that ``data`` holds. Raises ConnectError ``invalid_argument`` if it is none, nested too deep,
    or has too many values."""
    raw = bytes(data)
    if not raw:
        return {}
    if _is_too_deep(raw):
        raise ConnectError("invalid_argument", f"the JSON is nested more than {MAX_JSON_DEPTH} deep")
    if _has_too_many_items(raw):
        raise ConnectError("invalid_argument", f"the JSON has more than {MAX_JSON_ITEMS} values")
    try:
        message = _DECODER.decode(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ConnectError("invalid_argument", f"this is no JSON: {error}") from None
    if not isinstance(message, dict):
        raise ConnectError("invalid_argument", "a JSON object is needed")
    return message  # pyright: ignore[reportUnknownVariableType] - keys of JSON objects are strings


def encode_envelope(payload: bytes, flags: int = 0) -> bytes:
    return b"%c%b%b" % (flags, len(payload).to_bytes(4, "big"), payload)


def encode_end_stream(error: ConnectError | None = None) -> bytes:
    """The last envelope of a stream of responses."""
    return _END_WELL if error is None else encode_envelope(encode_json({"error": error_body(error)}), FLAG_END_STREAM)


def error_body(error: ConnectError) -> dict[str, str]:
    return {"code": error.code, "message": error.message}


def parse_error(body: dict[str, Any], http_status: int = 200) -> ConnectError:
    """The error that a unary answer's body, or the ``error`` of a last envelope, describes. Never fails: what the
    other side sends amiss becomes ``unknown``, or what the Connect protocol says of ``http_status``."""
    code = body.get("code")
    message = body.get("message")
    if not isinstance(code, str) or code not in HTTP_STATUS_OF_CODE:
        code = _CODE_OF_HTTP_STATUS.get(http_status, "unknown")
    return ConnectError(code, message[:_MAX_ERROR_TEXT] if isinstance(message, str) else f"HTTP status {http_status}")


def parse_end_stream(payload: bytes) -> ConnectError | None:
    """The error in a last envelope's payload, or None when the stream ended well. Raises ConnectError if it is no JSON."""
    error = decode_json(payload).get("error")
    if error is None:
        return None
    return parse_error(error if isinstance(error, dict) else {})  # pyright: ignore[reportUnknownArgumentType]


class EnvelopeReader:
    """Cuts a stream of bytes into envelopes. Holds at most one unfinished envelope (``limit_bytes`` + 5 bytes), and
    what ``feed`` was given beyond it."""

    __slots__ = ("_buffer", "_limit_bytes")

    def __init__(self, limit_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._buffer = bytearray()
        self._limit_bytes = limit_bytes

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[int, bytes]]:
        """Yield ``(flags, payload)`` of each envelope that is complete. Raises ConnectError: ``resource_exhausted``
        for a length beyond the limit, ``unimplemented`` for compression, ``internal`` for unknown flags."""
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= HEADER_BYTES:
                flags = buffer[at]
                length = int.from_bytes(buffer[at + 1 : at + HEADER_BYTES], "big")
                if length > self._limit_bytes:
                    raise ConnectError(
                        "resource_exhausted", f"a message of {length} bytes; at most {self._limit_bytes} are taken"
                    )
                if flags & FLAG_COMPRESSED:
                    raise ConnectError("unimplemented", "compressed messages are not taken")
                if flags & ~FLAG_END_STREAM:
                    raise ConnectError("internal", f"an envelope with unknown flags 0x{flags:02x}")
                end = at + HEADER_BYTES + length
                if len(buffer) < end:
                    return
                payload = bytes(memoryview(buffer)[at + HEADER_BYTES : end])
                at = end
                yield flags, payload
        finally:
            if at:
                del buffer[:at]

    def finish(self) -> None:
        """The stream has ended. Raises ConnectError if it did so inside an envelope."""
        if self._buffer:
            raise ConnectError("invalid_argument", "the stream ended inside a message")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON value")


def _is_too_deep(raw: bytes) -> bool:
    # Nearly all messages have fewer brackets than levels allowed. The others are boiled down to their brackets, from
    # which the innermost pairs are taken out once per level: all at the speed of C, and no recursion.
    if raw.count(b"[") + raw.count(b"{") <= MAX_JSON_DEPTH:
        return False
    brackets = _STRINGS.sub(b"", raw).translate(None, _ALL_BUT_BRACKETS)
    for _ in range(MAX_JSON_DEPTH):
        # One level of an array may hold several objects side by side: "[{}{}]" loses its inner pairs first.
        shorter = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if not shorter:
            return False
        if len(shorter) == len(brackets):
            return False  # unbalanced: the decoder says where
        brackets = shorter
    return True


def _has_too_many_items(raw: bytes) -> bool:
    if sum(raw.count(mark) for mark in _ITEM_MARKS) <= MAX_JSON_ITEMS:
        return False
    without_strings = _STRINGS.sub(b"", raw)
    return sum(without_strings.count(mark) for mark in _ITEM_MARKS) > MAX_JSON_ITEMS


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)
_END_WELL = encode_envelope(b"{}", FLAG_END_STREAM)
