"""Terminals that live on while nobody looks at them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Title = Annotated[str, StringConstraints(max_length=200)]


class WindowSize(BaseModel):
    model_config = ConfigDict(extra="forbid")

    columns: int = Field(ge=1, le=1000)
    rows: int = Field(ge=1, le=1000)


class OpenTerminalRequest(BaseModel):
    """``command`` empty: a login shell. ``title`` empty: what its program calls it."""

    model_config = ConfigDict(extra="forbid")

    command: list[str] = Field(default_factory=list[str], max_length=4096)
    title: Title = ""
    user: Annotated[str, StringConstraints(max_length=32)] = ""
    working_directory: str = ""
    size: WindowSize = WindowSize(columns=80, rows=24)


class ChangeTerminalRequest(BaseModel):
    """What is absent stays. ``title`` empty: what its program calls it. ``size`` holds while no viewer has a window."""

    model_config = ConfigDict(extra="forbid")

    title: Title | None = None
    size: WindowSize | None = None


class Terminal(BaseModel):
    """``exit_code`` and ``status``: its program has ended. ``viewers``: how many look at it. The end of a long ``command``
    is left out."""

    id: str
    title: str
    command: list[str]
    user: str
    columns: int
    rows: int
    created_at: datetime
    viewers: int
    pid: int
    exit_code: int | None = None
    status: str = ""


class TerminalList(BaseModel):
    items: list[Terminal]


class JoinedEvent(BaseModel):
    """The first frame of a viewer's; what was written before follows, up to ``replayed``."""

    type: Literal["joined"] = "joined"
    terminal: Terminal


class ReplayedEvent(BaseModel):
    type: Literal["replayed"] = "replayed"


class LostEvent(BaseModel):
    """So many bytes are kept no more, and were not sent."""

    type: Literal["lost"] = "lost"
    bytes: int


class TitleEvent(BaseModel):
    type: Literal["title"] = "title"
    title: str


class ResizedEvent(BaseModel):
    type: Literal["resized"] = "resized"
    columns: int
    rows: int
