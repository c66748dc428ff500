"""What a terminal's output says beside its text: the title that a program gives it, and the modes that it has set.

Used by the guest agent's terminals, and by the fake guests'. Pure and bounded: a program may write anything. The modes are
kept with the place of their last change, so that a viewer who begins in the middle is brought to where the terminal is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

TITLE_MAX_CHARACTERS: Final = 200
_COMMAND_MAX_CHARACTERS: Final = 4096
_SEQUENCE_MAX_BYTES: Final = 1024
_MODES_MAX: Final = 64
_MODE_SEQUENCE_MAX_BYTES: Final = 64
_LINE_SEARCH_BYTES: Final = 64 * 1024

_SEQUENCE: Final = re.compile(
    rb"\x1b(?:"
    rb"\](?P<kind>[02]);(?P<title>[^\x00-\x1f]{0,900})(?:\x07|\x1b\\)"
    rb"|\[\?(?P<modes>[0-9;]{1,40})(?P<set>[hl])"
    rb"|(?P<keypad>[=>])"
    rb"|(?P<reset>c)"
    rb")"
)
"""Source: xterm's ctlseqs: OSC 0 and 2, DECSET and DECRST, DECKPAM and DECKPNM, RIS."""
_STARTED: Final = re.compile(rb"\x1b(?:\](?:[02](?:;[^\x00-\x1f]{0,900}\x1b?)?)?|\[(?:\?[0-9;]{0,40})?)?")
"""What one of those begins with, at the end of a piece."""

# Ends whatever sequence was cut (CAN), and brings colours and character set back to the ordinary.
_CALM: Final = b"\x18\x1b[0m\x0f"


class TerminalOutput:
    """Reads all that a program writes. ``title`` is for people: one line of printable characters."""

    def __init__(self) -> None:
        self.title = ""
        self._rest = b""
        self._modes: dict[bytes, tuple[bytes, int]] = {}
        """Of each mode, how it was last set or reset, and where that stood; in the order of these changes, as some modes
        (the screens, the kinds of mouse reports) undo one another. Before them, the last reset of the whole terminal."""

    def read(self, data: bytes, position: int) -> None:
        """``position``: how many bytes of output were before ``data``."""
        if self._rest:
            position -= len(self._rest)
            data = self._rest + data
            self._rest = b""
        last = 0
        for found in _SEQUENCE.finditer(data):
            last = found.end()
            self._take(found, position + found.start())
        start = data.rfind(b"\x1b", max(last, len(data) - _SEQUENCE_MAX_BYTES))
        if start > last and data.endswith(b"\x1b"):
            # Perhaps the beginning of a title's end.
            before = data.rfind(b"\x1b]", max(last, len(data) - _SEQUENCE_MAX_BYTES), start)
            start = before if before >= 0 and _STARTED.fullmatch(data, before) else start
        if start >= 0 and _STARTED.fullmatch(data, start):
            self._rest = data[start:]

    def _take(self, found: re.Match[bytes], position: int) -> None:
        if found["kind"] is not None:
            self.title = clean_title(found["title"].decode("utf-8", "replace"))
        elif found["modes"] is not None:
            for mode in found["modes"].split(b";"):
                if mode and (mode in self._modes or len(self._modes) < _MODES_MAX):
                    self._change(mode, b"\x1b[?%b%b" % (mode, found["set"]), position)
        elif found["keypad"] is not None:
            self._change(b"keypad", found[0], position)
        else:
            self._modes.clear()
            self._change(b"reset", found[0], position)

    def _change(self, mode: bytes, sequence: bytes, position: int) -> None:
        self._modes.pop(mode, None)
        self._modes[mode] = (sequence, position)

    def opening(self, seen: int, position: int) -> bytes:
        """What to send before the output from ``position`` on, to a viewer who has had the output up to ``seen``."""
        # A sequence of which the viewer has had a part only is told again.
        missed = range(seen - _MODE_SEQUENCE_MAX_BYTES, position)
        return _CALM + b"".join(sequence for sequence, changed in self._modes.values() if changed in missed)


def clean_title(text: str) -> str:
    shown = "".join(character if character.isprintable() else " " for character in text[: 4 * TITLE_MAX_CHARACTERS])
    return shown.strip()[:TITLE_MAX_CHARACTERS]


def shown_command(words: Sequence[str]) -> list[str]:
    """Without the end of a long one, so that a list of all terminals fits into a message."""
    room = _COMMAND_MAX_CHARACTERS
    shown: list[str] = []
    for word in words:
        if room <= 0:
            break
        shown.append(word[:room])
        room -= len(word)
    return shown


def line_start(data: bytes) -> int:
    """How much of ``data``, which begins anywhere, to leave out, so that the rest begins a line; or a character, where
    there is no line's end nearby."""
    end = data.find(b"\n", 0, _LINE_SEARCH_BYTES)
    if end >= 0:
        return end + 1
    start = 0
    while start < min(len(data), 4) and data[start] & 0xC0 == 0x80:
        start += 1
    return start
