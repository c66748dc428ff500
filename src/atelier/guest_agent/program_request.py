"""Reads the request to start a program, for a process or for a terminal's session, and starts it.

Used by ``process`` and ``terminal``. The message is that of E2B's process.proto: ``process`` (cmd, args, envs, cwd), ``pty``,
``stdin``. Whatever does not fit raises ConnectError ``invalid_argument``.
"""

from __future__ import annotations

from binascii import Error as BinasciiError
from binascii import a2b_base64
from typing import Any, Final, cast

from atelier.guest_agent.rpc import Message
from atelier.guest_agent.spawn import DEFAULT_PATH, Spawned, spawn
from atelier.guest_agent.state import AgentState
from atelier.guest_agent.users import User
from atelier.guest_protocol.connect import ConnectError

INPUT_SECONDS: Final = 60.0
"""How long input waits for a program to read it when the client sets no limit."""
_MAX_TERMINAL: Final = 65535


def start_program(message: Message, state: AgentState, user: User) -> tuple[Spawned, dict[str, Any]]:
    """Start what ``message`` asks for as ``user``; with it its ProcessConfig. Raises ConnectError, as ``spawn`` does."""
    config = object_of(message, "process")
    terminal = message.get("pty")
    directory = config.get("cwd") or ""
    if not isinstance(directory, str):
        raise wrong("cwd", "text")
    spawned = spawn(
        _arguments(config),
        _environment(state, user, config, has_terminal=terminal is not None),
        state.resolve(directory, user) if directory or state.default_directory else None,
        user,
        with_stdin=message.get("stdin") is not False,
        terminal_size=None if terminal is None else terminal_size(message),
    )
    return spawned, config


def _environment(state: AgentState, user: User, config: dict[str, Any], *, has_terminal: bool) -> dict[str, str]:
    environment = {
        "PATH": DEFAULT_PATH,
        "HOME": user.home,
        "USER": user.name,
        "LOGNAME": user.name,
        "SHELL": user.shell,
    }
    if has_terminal:
        environment["TERM"] = "xterm-256color"
    environment.update(state.environment)
    given = config.get("envs")
    if given is not None:
        if not isinstance(given, dict):
            raise wrong("envs", "an object")
        for name, value in cast("dict[str, Any]", given).items():
            if not isinstance(value, str):
                raise wrong(f"the variable {name[:100]}", "text")
            environment[name] = value
    return environment


def wrong(name: str, wanted: str) -> ConnectError:
    return ConnectError("invalid_argument", f"{name} must be {wanted}")


def object_of(message: Message, name: str) -> dict[str, Any]:
    value = message.get(name)
    if not isinstance(value, dict):
        raise wrong(name, "an object")
    return cast("dict[str, Any]", value)


def integer(value: object, name: str) -> int:
    """A number, or its decimal text: protobuf's JSON allows both."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise wrong(name, "a number")


def _arguments(config: dict[str, Any]) -> list[str]:
    program = config.get("cmd")
    if not isinstance(program, str) or not program:
        raise wrong("cmd", "the program to start")
    arguments: Any = config.get("args") or []
    if not isinstance(arguments, list):
        raise wrong("args", "a list of texts")
    words = cast("list[Any]", arguments)
    if not all(isinstance(word, str) for word in words):
        raise wrong("args", "a list of texts")
    return [program, *words]


def terminal_size(message: Message) -> tuple[int, int]:
    """(columns, rows) of a message's PTY; 80 by 24 if it names no size."""
    size: Any = object_of(message, "pty").get("size") or {}
    if not isinstance(size, dict):
        raise wrong("size", "an object")
    numbers = cast("dict[str, Any]", size)
    columns = integer(numbers.get("cols", 80), "cols")
    rows = integer(numbers.get("rows", 24), "rows")
    if not (0 <= columns <= _MAX_TERMINAL and 0 <= rows <= _MAX_TERMINAL):
        raise wrong("cols and rows", f"from 0 to {_MAX_TERMINAL}")
    return columns, rows


def input_of(given: Message) -> tuple[str, bytes]:
    """What a ProcessInput holds, ``stdin`` or ``pty``, and its bytes."""
    kind = "pty" if "pty" in given else "stdin"
    encoded = given.get(kind)
    if not isinstance(encoded, str):
        raise ConnectError("invalid_argument", "input needs stdin or pty, in base64")
    try:
        return kind, a2b_base64(encoded, strict_mode=True)
    except (BinasciiError, ValueError):
        raise ConnectError("invalid_argument", f"{kind} is no base64") from None
