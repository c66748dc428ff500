"""The terminals of a sandbox that live on while nobody looks at them, as values. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from atelier.model.guest import ProcessEnded, ProcessOutput, TerminalSize


@dataclass(frozen=True, slots=True)
class TerminalSession:
    """``title``: what a person, else its program, calls it; may be empty. ``size`` is what all its viewers can show.
    ``ended`` None: its program runs."""

    id: str
    title: str
    arguments: tuple[str, ...]
    user: str
    size: TerminalSize
    created_at: datetime
    viewers: int
    pid: int
    ended: ProcessEnded | None = None


@dataclass(frozen=True, slots=True)
class TerminalJoined:
    """The first event of a viewer's. ``viewer``: its number, for ``resize``. What was written before follows."""

    session: TerminalSession
    viewer: int


@dataclass(frozen=True, slots=True)
class TerminalReplayed:
    """What was written before has been sent; from here on it is news."""


@dataclass(frozen=True, slots=True)
class TerminalLost:
    """So many bytes are kept no more, and were not sent; the output goes on at a line's start."""

    lost_bytes: int


@dataclass(frozen=True, slots=True)
class TerminalTitled:
    title: str


@dataclass(frozen=True, slots=True)
class TerminalResized:
    size: TerminalSize


TerminalEvent = (
    TerminalJoined | TerminalReplayed | TerminalLost | TerminalTitled | TerminalResized | ProcessOutput | ProcessEnded
)
