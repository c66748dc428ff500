"""The routes of terminals: what is sent, and how the answer is read. Without I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from atelier.client.addresses import encode_query, encode_segment
from atelier.client.call import (
    Call,
    TerminalSocket,
    make_body,
    make_patch,
    read_model,
    read_nothing,
    sandbox_path,
)
from atelier.client.calls import Command, process_event_parser, to_arguments
from atelier.client.errors import error_from_body, not_understood
from atelier.model.guest import ProcessEnded, ProcessEvent, ProcessOutput, TerminalSize
from atelier.schemas.errors import ErrorBody
from atelier.schemas.processes import EndedEvent, FailedEvent
from atelier.schemas.terminals import (
    ChangeTerminalRequest,
    JoinedEvent,
    LostEvent,
    OpenTerminalRequest,
    ReplayedEvent,
    ResizedEvent,
    Terminal,
    TerminalList,
    TitleEvent,
)

ViewerEvent: TypeAlias = (
    JoinedEvent | ReplayedEvent | LostEvent | TitleEvent | ResizedEvent | ProcessOutput | ProcessEnded
)
"""What a viewer of a terminal that lives on is told: JoinedEvent, what was written before, ReplayedEvent, what follows."""

_Said: TypeAlias = Annotated[
    JoinedEvent | ReplayedEvent | LostEvent | TitleEvent | ResizedEvent | EndedEvent | FailedEvent,
    Field(discriminator="type"),
]
_SAID: TypeAdapter[_Said] = TypeAdapter(_Said)


def _path(sandbox: str, terminal: str = "", below: str = "") -> str:
    one = f"/{encode_segment(terminal, 'terminal')}{below}" if terminal else ""
    return sandbox_path(sandbox, f"/terminals{one}")


def list_terminals(sandbox: str, *, wake: bool = False) -> Call[TerminalList]:
    """``wake``: it is a use of the sandbox; a paused one is resumed first."""
    operation = f"list the terminals of {sandbox}"
    path = _path(sandbox) + encode_query([("wake", "true")] if wake else [])
    return Call(operation, "GET", path, read_model(TerminalList, operation), repeatable=True)


def open_terminal(
    sandbox: str, command: Command, *, title: str, size: TerminalSize, user: str, working_directory: str
) -> Call[Terminal]:
    operation = f"open a terminal in {sandbox}"
    body = make_body(
        OpenTerminalRequest,
        operation,
        command=to_arguments(command) if command else [],
        title=title,
        size={"columns": size.columns, "rows": size.rows},
        user=user,
        working_directory=working_directory,
    )
    return Call(operation, "POST", _path(sandbox), read_model(Terminal, operation), body)


def rename_terminal(sandbox: str, terminal: str, title: str) -> Call[Terminal]:
    operation = f"name the terminal {terminal} of {sandbox}"
    body = make_patch(ChangeTerminalRequest, operation, title=title)
    return Call(operation, "PATCH", _path(sandbox, terminal), read_model(Terminal, operation), body)


def close_terminal(sandbox: str, terminal: str) -> Call[None]:
    return Call(f"close the terminal {terminal} of {sandbox}", "DELETE", _path(sandbox, terminal), read_nothing)


def attach_terminal(
    sandbox: str, terminal: str, size: TerminalSize, *, wake: bool = True
) -> TerminalSocket[ViewerEvent]:
    """``wake`` false: for who comes back by itself; a paused sandbox stays so."""
    operation = f"attach to the terminal {terminal} of {sandbox}"
    query = encode_query([("columns", size.columns), ("rows", size.rows), ("wake", str(wake).lower())])
    hint = "the terminal goes on; attach to it again"
    return TerminalSocket(operation, _path(sandbox, terminal, "/attach") + query, _viewer_event_parser(operation), hint)


def one_shot_terminal(
    sandbox: str, command: Command, *, size: TerminalSize, user: str, working_directory: str, pid: int | None
) -> TerminalSocket[ProcessEvent]:
    """A program with a terminal of one reader's; with ``pid`` one that runs, instead of ``command``."""
    query: list[tuple[str, str | bytes | int]] = [("columns", size.columns), ("rows", size.rows)]
    if pid is not None:
        query.append(("pid", pid))
    elif command:
        query.extend(("command", argument) for argument in to_arguments(command))
    if user:
        query.append(("user", user))
    if working_directory:
        query.append(("working_directory", working_directory))
    operation = f"open a terminal in {sandbox}"
    hint = "the program in the terminal still runs; attach to it again by its pid"
    path = sandbox_path(sandbox, f"/pty{encode_query(query)}")
    return TerminalSocket(operation, path, process_event_parser(operation), hint)


def _viewer_event_parser(operation: str) -> Callable[[bytes], ViewerEvent]:
    def parse(frame: bytes) -> ViewerEvent:
        try:
            said = _SAID.validate_json(frame)
        except ValidationError as error:
            raise not_understood(operation, error) from error
        if isinstance(said, FailedEvent):
            raise error_from_body(ErrorBody(code=said.code, message=said.message, hint=said.hint))
        if isinstance(said, EndedEvent):
            return ProcessEnded(said.exit_code, said.status, said.error)
        return said

    return parse
