"""Processes in a sandbox: exec (streamed), run (collected), input and signals."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StringConstraints

from atelier.schemas.request_body import RequestBody
from atelier.schemas.sandboxes import EnvironmentName, EnvironmentValue


class ExecRequest(RequestBody):
    """A program to start. ``command[0]`` is the program, found in the guest's PATH: no shell is added.

    ``user`` empty: the image's default user. ``timeout_seconds`` ends the whole process group.
    """

    command: list[str] = Field(min_length=1, max_length=4096)
    environment: dict[EnvironmentName, EnvironmentValue] = Field(default_factory=dict[str, str], max_length=1000)
    working_directory: str = ""
    user: Annotated[str, StringConstraints(max_length=32)] = ""
    timeout_seconds: StrictFloat | None = Field(None, gt=0, le=30 * 24 * 3600)
    stdin: StrictBool = False
    """Keep stdin open for ``POST .../processes/{pid}/stdin``; else the program reads end-of-file at once."""


class RunRequest(ExecRequest):
    """As exec, but the answer comes when the program has ended, with all that it wrote, up to ``output_limit_bytes``
    of each stream (the rest is dropped and marked)."""

    stdin: StrictBool = Field(False, exclude=True)
    input: str | None = None
    input_base64: str | None = None
    encoding: Literal["utf-8", "base64"] = "utf-8"
    """How stdout and stderr are written in the answer; with utf-8, bytes that are none become U+FFFD."""
    output_limit_bytes: StrictInt = Field(4 * 1024 * 1024, ge=0, le=64 * 1024 * 1024)


class RunResult(BaseModel):
    """``exit_code`` is 128+N after signal N; ``error`` is ``timeout`` when the time limit ended it, else empty."""

    exit_code: int
    stdout: str
    stderr: str
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    error: str = ""


class StartedEvent(BaseModel):
    type: Literal["started"] = "started"
    pid: int


class OutputEvent(BaseModel):
    """``data`` is base64. ``stream``: ``stdout``, ``stderr`` or ``pty``."""

    type: Literal["output"] = "output"
    stream: str
    data: str


class EndedEvent(BaseModel):
    type: Literal["ended"] = "ended"
    exit_code: int
    status: str
    error: str = ""


class FailedEvent(BaseModel):
    """The stream broke off after it had begun (the status line was already sent)."""

    type: Literal["failed"] = "failed"
    code: str
    message: str
    hint: str = ""


ExecEvent = Annotated[StartedEvent | OutputEvent | EndedEvent | FailedEvent, Field(discriminator="type")]
"""One line of an ``application/x-ndjson`` answer: ``started``, outputs, then ``ended`` or ``failed``."""


class Process(BaseModel):
    pid: int
    command: list[str]
    working_directory: str
    tag: str = ""
    terminal: bool = False


class ProcessList(BaseModel):
    items: list[Process]


class SignalRequest(RequestBody):
    """``signal``: a name (``SIGTERM``, ``TERM``) or a number from 1 to 64."""

    signal: str | StrictInt = "SIGTERM"
