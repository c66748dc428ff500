"""Reads what a guest says of its terminals; hostile, as all that ``messages`` reads, and bounded here."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from atelier.drivers.guest.messages import (
    Message,
    as_integer,
    as_list,
    as_object,
    as_text,
    plain,
    process_command,
    process_ended,
    process_output,
    protocol_error,
)
from atelier.guest_protocol.terminal_output import clean_title
from atelier.model.guest import TerminalSize
from atelier.model.terminal import (
    TerminalEvent,
    TerminalJoined,
    TerminalLost,
    TerminalReplayed,
    TerminalResized,
    TerminalSession,
    TerminalTitled,
)

_SESSIONS_MAX: Final = 256
_VIEWERS_MAX: Final = 1024
_SIDE_MAX: Final = 1000
"""As large as any of its viewers' windows may be: their browsers keep a cell for each place."""
_YEAR_9999_MS: Final = 253_370_764_800_000
_ID: Final = re.compile(r"[0-9a-z]{1,32}")


def terminal_sessions(message: Message) -> list[TerminalSession]:
    """``terminal.ListResponse``."""
    return [terminal_session(item) for item in as_list(message.get("terminals"), "terminals", _SESSIONS_MAX)]


def terminal_session(value: object) -> TerminalSession:
    described = as_object(value, "terminal")
    name = as_text(described.get("id"), "id")
    if not _ID.fullmatch(name):
        raise protocol_error("a terminal's id is none")
    end = described.get("end")
    created_at_ms = as_integer(described.get("createdAtMs"), "createdAtMs", 0, _YEAR_9999_MS)
    return TerminalSession(
        id=name,
        title=clean_title(as_text(described.get("title"), "title")),
        arguments=process_command(as_object(described.get("config", {}), "config")),
        user=plain(as_text(described.get("user"), "user"))[:64],
        size=_size(described.get("size")),
        created_at=datetime.fromtimestamp(created_at_ms / 1000, UTC),
        viewers=as_integer(described.get("viewers"), "viewers", 0, _VIEWERS_MAX),
        pid=as_integer(described.get("pid"), "pid", 1, 2**22),
        ended=None if end is None else process_ended(as_object(end, "end")),
    )


def terminal_event(message: Message) -> TerminalEvent | None:
    """``terminal.AttachResponse``; None for what says nothing (a keep-alive)."""
    event = as_object(message.get("event", {}), "event")
    if "data" in event:
        return process_output(as_object(event["data"], "data"))
    if "start" in event:
        start = as_object(event["start"], "start")
        viewer = as_integer(start.get("viewer"), "viewer", 1, 2**31)
        return TerminalJoined(terminal_session(start.get("terminal")), viewer)
    if "replayed" in event:
        return TerminalReplayed()
    if "lost" in event:
        return TerminalLost(as_integer(as_object(event["lost"], "lost").get("bytes"), "bytes"))
    if "title" in event:
        return TerminalTitled(clean_title(as_text(as_object(event["title"], "title").get("title"), "title")))
    if "resize" in event:
        return TerminalResized(_size(as_object(event["resize"], "resize").get("size")))
    if "end" in event:
        return process_ended(as_object(event["end"], "end"))
    return None


def _size(value: object) -> TerminalSize:
    size = as_object(value, "size")
    columns, rows = (as_integer(size.get(name), name, 1, _SIDE_MAX) for name in ("cols", "rows"))
    return TerminalSize(columns, rows)
