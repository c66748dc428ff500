"""The heads of HTTP/1.1 messages: read strictly, written anew. Without I/O; used by ``preview_exchange``.

Both sides are hostile: a visitor who wants two servers to see different requests, and a guest that wants a visitor to see
an answer that is not its own. So what RFC 9112 lets a server refuse is refused, and nothing is passed on as it came: each
head is taken apart and put together again. Source: RFC 9110, RFC 9112.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

HEAD_MAX_BYTES: Final = 32 * 1024
HEADERS_MAX: Final = 128

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_VALUE: Final = rb"[\t\x20-\x7e\x80-\xff]"
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb"{1,32}) (/[\x21-\x7e]*|\*) HTTP/1\.([01])")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: (" + _VALUE + rb"*))?")
# Neither a folded line, nor space before the colon, nor a lone CR or LF, nor NUL gets past the first of these; with it, the
# second leaves nothing out. Possessive: what is no header is found to be none in one go.
_HEADERS: Final = re.compile(rb"(?:" + _TOKEN + rb"++:" + _VALUE + rb"*+\r\n)*+")
_HEADER: Final = re.compile(rb"(" + _TOKEN + rb"++):(" + _VALUE + rb"*+)\r\n")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
_TELLING: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"upgrade", b"connection"})
_NOT_A_HOPS: Final = frozenset({b"host", b"content-length", b"cookie", b"authorization"})
"""The host and how long a body is nobody may have taken out by naming them."""
_NO_BODY_STATUS: Final = frozenset({204, 304})

Header = tuple[bytes, bytes, bytes]
"""(name in lower case, name as it came, value)."""
Framing = Literal["none", "length", "chunked", "close"]


class BadHead(Exception):
    """``status`` is what a visitor is answered whose request this was."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Body(NamedTuple):
    """How a body is told from what follows. ``length``: in bytes, where that is known."""

    framing: Framing
    length: int = 0

    @property
    def is_empty(self) -> bool:
        return self.framing == "none" or (self.framing == "length" and self.length == 0)


NO_BODY: Final = Body("none")
_UNTIL_CLOSED: Final = Body("close")
_CHUNKED: Final = Body("chunked")


class RequestFields(NamedTuple):
    """What the header lines of a request say. ``headers`` are those that go from end to end, ``Content-Length`` among
    them."""

    host: bytes
    headers: list[Header]
    body: Body
    keeps_alive: bool
    is_http_1_0: bool
    is_web_socket: bool


@dataclass(slots=True)
class ResponseHead:
    """As of a request. ``body`` is what its status says of it; whether the request was HEAD, the caller knows."""

    status: int
    reason: bytes
    headers: list[Header]
    body: Body
    keeps_alive: bool
    is_switching: bool


class _Headers:
    """The header lines of one message, and what some of them say of the message itself. ``lines``: all but the last
    with their ends. Raises BadHead."""

    hosts: tuple[bytes, ...] = ()
    lengths: tuple[bytes, ...] = ()
    codings: tuple[bytes, ...] = ()
    upgrades: tuple[bytes, ...] = ()
    options: frozenset[bytes] = frozenset()

    def __init__(self, lines: bytes) -> None:
        block = lines + b"\r\n" if lines else b""
        if block.count(b"\n") > HEADERS_MAX:
            raise BadHead(431, f"more than {HEADERS_MAX} headers")
        if _HEADERS.fullmatch(block) is None:
            raise BadHead(400, "a header is malformed")
        self.named: list[Header] = [(name.lower(), name, value.strip(b" \t")) for name, value in _HEADER.findall(block)]
        for name, _, value in self.named:
            if name in _TELLING:
                self._note(name, value)

    def _note(self, name: bytes, value: bytes) -> None:
        match name:
            case b"host":
                self.hosts += (value,)
            case b"content-length":
                self.lengths += (value,)
            case b"transfer-encoding":
                self.codings += (value.lower(),)
            case b"upgrade":
                self.upgrades += (value.lower(),)
            case _:
                self.options |= {option.strip().lower() for option in value.split(b",")}

    def end_to_end(self) -> list[Header]:
        dropped = _HOP_BY_HOP | (self.options - _NOT_A_HOPS) if self.options else _HOP_BY_HOP
        return [header for header in self.named if header[0] not in dropped]

    def body(self, without: Body, *, is_http_1_0: bool) -> Body:
        """``without``: what a message is that says nothing of its body."""
        if self.codings:
            if self.lengths or is_http_1_0:
                raise BadHead(400, "the length of the body is said in two ways")
            if self.codings != (b"chunked",):
                raise BadHead(501, "no transfer coding but chunked is carried")
            return _CHUNKED
        if not self.lengths:
            return without
        length, *more = self.lengths
        if more or not _LENGTH.fullmatch(length):
            raise BadHead(400, "the length of the body is no number, or said twice")
        return Body("length", int(length))


def parse_request_line(line: bytes) -> tuple[bytes, bytes, bool]:
    """(method, target, whether it is HTTP/1.0). Raises BadHead."""
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        raise BadHead(400, "the first line is no request of HTTP/1.1")
    method, target, minor = found.groups()
    if method in (b"CONNECT", b"TRACE") or (target == b"*" and method != b"OPTIONS"):
        raise BadHead(405, "this method is not carried")
    return method, target, minor == b"0"


def parse_request_fields(lines: bytes, *, is_http_1_0: bool) -> RequestFields:
    """``lines``: those behind the first, without the end of the last. Raises BadHead."""
    read = _Headers(lines)
    if len(read.hosts) != 1:
        raise BadHead(400, "a request names its host, once")
    options = read.options
    body = read.body(NO_BODY, is_http_1_0=is_http_1_0)
    return RequestFields(
        host=read.hosts[0],
        headers=read.end_to_end(),
        body=body,
        keeps_alive=b"close" not in options and (not is_http_1_0 or b"keep-alive" in options),
        is_http_1_0=is_http_1_0,
        is_web_socket=b"upgrade" in options and body.is_empty and read.upgrades == (b"websocket",),
    )


def parse_response(head: bytes) -> ResponseHead:
    """``head``: without the empty line at its end. Raises BadHead, whose status is of no meaning then."""
    first, _, lines = head.partition(b"\r\n")
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise BadHead(502, "the first line is no answer of HTTP/1.1")
    minor, code, reason = found.groups(b"")
    status = int(code)
    read = _Headers(lines)
    options = read.options
    has_none = status < 200 or status in _NO_BODY_STATUS
    body = read.body(_UNTIL_CLOSED, is_http_1_0=minor == b"0")
    return ResponseHead(
        status=status,
        reason=reason,
        headers=read.end_to_end(),
        body=NO_BODY if has_none else body,
        keeps_alive=minor == b"1" and b"close" not in options and (has_none or body.framing != "close"),
        is_switching=status == 101 and b"upgrade" in options,
    )


def write_request_line(method: bytes, target: bytes, *, is_http_1_0: bool) -> bytes:
    return b"%b %b HTTP/1.%d\r\n" % (method, target, not is_http_1_0)


def write_request_fields(fields: RequestFields, headers: Iterable[Header]) -> bytes:
    """What follows the first line, for the next server: ``headers``, and what the fields say of the message."""
    lines = [b"%b: %b\r\n" % (name, value) for _, name, value in headers]
    if fields.body.framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if fields.is_web_socket:
        lines.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    else:
        lines.append(b"Connection: close\r\n\r\n" if fields.is_http_1_0 else b"Connection: keep-alive\r\n\r\n")
    return b"".join(lines)


def write_response(head: ResponseHead, headers: Iterable[Header], body: Body, *, keeps_alive: bool) -> bytes:
    """The answer for the visitor, with these headers. ``body``: how it is framed there."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)]
    lines += [b"%b: %b\r\n" % (name, value) for _, name, value in headers]
    if body.framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if head.is_switching:
        lines.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    else:
        lines.append(b"\r\n" if keeps_alive else b"Connection: close\r\n\r\n")
    return b"".join(lines)
