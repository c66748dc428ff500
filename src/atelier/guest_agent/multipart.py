"""Reads a ``multipart/form-data`` body as it comes, in big pieces. Knows no file and no socket.

Called by ``files``. Keeps at most one piece, one set of part headers and one delimiter's length in memory.
Source: RFC 7578, RFC 2046 section 5.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_PART_HEADERS_MAX_BYTES: Final = 16 * 1024
_BOUNDARY_MAX_BYTES: Final = 200


class MultipartError(ValueError):
    """The body is no proper multipart body."""


@dataclass(frozen=True, slots=True)
class PartBegins:
    """``name`` and ``filename`` as the client wrote them; ``filename`` is None for a plain form field."""

    name: bytes
    filename: bytes | None


@dataclass(frozen=True, slots=True)
class PartBytes:
    content: memoryview


@dataclass(frozen=True, slots=True)
class PartEnds:
    pass


MultipartEvent = PartBegins | PartBytes | PartEnds


def header_parameters(value: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Split ``form-data; name="file"; filename="a\\"b"`` into its first word and its parameters (keys in lower case)."""
    first, _, rest = value.partition(b";")
    parameters: dict[bytes, bytes] = {}
    position = 0
    while position < len(rest):
        equals = rest.find(b"=", position)
        if equals < 0:
            break
        key = rest[position:equals].strip(b" \t;").lower()
        position = equals + 1
        if rest[position : position + 1] == b'"':
            position += 1
            text = bytearray()
            while position < len(rest) and rest[position] != 0x22:
                if rest[position] == 0x5C and position + 1 < len(rest):
                    position += 1
                text.append(rest[position])
                position += 1
            parameters[key] = bytes(text)
            position = rest.find(b";", position)
        else:
            end = rest.find(b";", position)
            parameters[key] = rest[position : end if end >= 0 else len(rest)].strip()
            position = end
        if position < 0:
            break
        position += 1
    return first.strip().lower(), parameters


class MultipartReader:
    """``feed`` each piece of the body, then ``finish``. Both raise MultipartError."""

    def __init__(self, boundary: bytes) -> None:
        if not 0 < len(boundary) <= _BOUNDARY_MAX_BYTES:
            raise MultipartError("the boundary is missing or too long")
        self._delimiter = b"\r\n--" + boundary
        # The first delimiter may stand at the very beginning, without its line end.
        self._held = b"\r\n"
        self._state = self._preamble

    def feed(self, piece: bytes | memoryview) -> Iterator[MultipartEvent]:
        buffer = self._held + bytes(piece)
        position = 0
        while True:
            state = self._state
            event, next_position = state(buffer, position)
            if event is not None:
                yield event
            elif next_position == position and self._state == state:
                break
            position = next_position
        self._held = buffer[position:]

    def finish(self) -> None:
        if self._state != self._epilogue:
            raise MultipartError("the body ended in the middle of a part")

    # Each state answers (event, new position); the same position without an event or a new
    # state: it wants more bytes.

    def _preamble(self, buffer: bytes, position: int) -> tuple[MultipartEvent | None, int]:
        found = buffer.find(self._delimiter, position)
        if found < 0:
            return None, max(position, len(buffer) - len(self._delimiter))
        self._state = self._after_delimiter
        return None, found + len(self._delimiter)

    def _after_delimiter(self, buffer: bytes, position: int) -> tuple[MultipartEvent | None, int]:
        if buffer[position : position + 2] == b"--":
            self._state = self._epilogue
            return None, len(buffer)
        line_end = buffer.find(b"\r\n", position)
        if line_end < 0:
            if len(buffer) - position > _BOUNDARY_MAX_BYTES:
                raise MultipartError("no line end behind a boundary")
            return None, position
        if buffer[position:line_end].strip(b" \t"):
            raise MultipartError("unexpected bytes behind a boundary")
        self._state = self._headers
        # The line end stays: together with an empty line it ends an empty set of headers too.
        return None, line_end

    def _headers(self, buffer: bytes, position: int) -> tuple[MultipartEvent | None, int]:
        end = buffer.find(b"\r\n\r\n", position)
        if (end if end >= 0 else len(buffer)) - position > _PART_HEADERS_MAX_BYTES:
            raise MultipartError("the headers of a part are too long")
        if end < 0:
            return None, position
        name, filename = b"", None
        for line in buffer[position:end].split(b"\r\n"):
            key, _, value = line.partition(b":")
            if key.strip().lower() == b"content-disposition":
                _, parameters = header_parameters(value)
                name = parameters.get(b"name", b"")
                filename = parameters.get(b"filename")
                extended = parameters.get(b"filename*")
                if extended is not None and extended.lower().startswith(b"utf-8'"):
                    from urllib.parse import unquote_to_bytes

                    filename = unquote_to_bytes(extended.split(b"'", 2)[-1])
        self._state = self._content
        return PartBegins(name, filename), end + 4

    def _content(self, buffer: bytes, position: int) -> tuple[MultipartEvent | None, int]:
        found = buffer.find(self._delimiter, position)
        if found == position:
            self._state = self._after_delimiter
            return PartEnds(), position + len(self._delimiter)
        end = found if found >= 0 else len(buffer) - len(self._delimiter) + 1
        if end <= position:
            return None, position
        return PartBytes(memoryview(buffer)[position:end]), end

    def _epilogue(self, buffer: bytes, position: int) -> tuple[MultipartEvent | None, int]:
        return None, len(buffer)
