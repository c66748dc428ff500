"""The service process.Process, with E2B's messages: start, connect, list, signal and feed processes and terminals.

Registered by ``__main__``. The messages are the protobuf JSON mapping of E2B's process.proto. Where this differs from
E2B on purpose: a signal and the time limit reach the whole process group; Connect replays the newest output, also of a
process that has ended while nobody was attached; any signal may be sent; ``end`` carries ``signal``, ``start``
``lostBytes``, ListResponse ``terminal``.

If the agent itself is killed, its processes live on in sessions of their own, but their pipes break: the next write to
stdout ends them (SIGPIPE) unless they ignore it, terminals are hung up (SIGHUP), and the new agent does not list them.
"""

from __future__ import annotations

import asyncio
import signal
import time
from binascii import Error as BinasciiError
from binascii import a2b_base64
from collections.abc import AsyncIterator
from typing import Any, Final, cast

from atelier.guest_agent.event_stream import EventStream
from atelier.guest_agent.http import STREAM, Request, Response, Router
from atelier.guest_agent.rpc import (
    STREAM_HEADERS,
    Message,
    add_client_stream,
    add_unary,
    read_stream_request,
    timeout_seconds,
)
from atelier.guest_agent.running_process import RunningProcess
from atelier.guest_agent.spawn import DEFAULT_PATH, spawn
from atelier.guest_agent.state import AgentState
from atelier.guest_agent.users import User
from atelier.guest_protocol.connect import ConnectError

SERVICE: Final = "/process.Process/"

_KEEPALIVE_SECONDS: Final = 90.0
_INPUT_SECONDS: Final = 60.0
"""How long SendInput waits for a program to read when its client sets no limit."""
_MAX_ENDED: Final = 64
_MAX_ENDED_BYTES: Final = 16 * 1024 * 1024
_KEEP_ENDED_SECONDS: Final = 600.0
_MAX_TERMINAL: Final = 65535


class ProcessService:
    """The processes that were started through this agent, by pid."""

    def __init__(self, state: AgentState) -> None:
        self._state = state
        self._running: dict[int, RunningProcess] = {}
        self._ended: dict[int, tuple[float, RunningProcess]] = {}
        """Those whose end nobody has read yet, oldest first: a client that comes back learns how they ended."""

    def register(self, router: Router) -> None:
        router.add("POST", SERVICE + "Start", self.start, form=STREAM)
        router.add("POST", SERVICE + "Connect", self.connect, form=STREAM)
        add_unary(router, SERVICE + "List", self.list_processes)
        add_unary(router, SERVICE + "Update", self.update)
        add_unary(router, SERVICE + "SendInput", self.send_input)
        add_client_stream(router, SERVICE + "StreamInput", self.stream_input)
        add_unary(router, SERVICE + "SendSignal", self.send_signal)
        add_unary(router, SERVICE + "CloseStdin", self.close_stdin)

    # Streams. They answer with an iterator of envelopes of their own: one layer less on the way of the output.

    async def start(self, request: Request) -> Response:
        message = await read_stream_request(request)
        limit_seconds = timeout_seconds(request)
        keepalive_seconds = _keepalive_seconds(request)
        config = _object(message, "process")
        terminal = message.get("pty")
        tag = message.get("tag")
        if tag is not None and not isinstance(tag, str):
            raise _wrong("tag", "text")
        user = self._state.user_of(request)
        directory = config.get("cwd") or ""
        if not isinstance(directory, str):
            raise _wrong("cwd", "text")
        arguments = _arguments(config)
        spawned = spawn(
            arguments,
            self._environment(user, config, has_terminal=terminal is not None),
            self._state.resolve(directory, user) if directory or self._state.default_directory else None,
            user,
            with_stdin=message.get("stdin") is not False,
            terminal_size=None if terminal is None else _terminal_size(message),
        )
        process = RunningProcess(spawned, config, tag, self._on_end, self._on_read)
        self._ended.pop(process.pid, None)
        self._running[process.pid] = process
        if limit_seconds:
            process.set_time_limit(limit_seconds)
        return Response(200, STREAM_HEADERS, process.attach(keepalive_seconds, replay=False))

    async def connect(self, request: Request) -> Response:
        message = await read_stream_request(request)
        limit_seconds = timeout_seconds(request)
        process = self._find(message, with_ended=True)
        stream: EventStream = process.attach(_keepalive_seconds(request), replay=True)
        if limit_seconds:
            stream.set_deadline(limit_seconds)
        return Response(200, STREAM_HEADERS, stream)

    # Unary calls.

    async def list_processes(self, message: Message, request: Request) -> Message:
        processes: list[dict[str, Any]] = []
        for process in self._running.values():
            entry: dict[str, Any] = {"config": process.config, "pid": process.pid, "terminal": process.is_terminal}
            if process.tag is not None:
                entry["tag"] = process.tag
            processes.append(entry)
        return {"processes": processes}

    async def update(self, message: Message, request: Request) -> Message:
        process = self._find(message)
        if message.get("pty") is not None:
            process.resize(*_terminal_size(message))
        return {}

    async def send_input(self, message: Message, request: Request) -> Message:
        limit_seconds = timeout_seconds(request) or _INPUT_SECONDS
        try:
            async with asyncio.timeout(limit_seconds):
                await self._write(self._find(message), _object(message, "input"))
        except TimeoutError:
            raise ConnectError(
                "deadline_exceeded", f"the program has not read all of its input within {limit_seconds:g} s"
            ) from None
        return {}

    async def stream_input(self, messages: AsyncIterator[Message], request: Request) -> Message:
        limit_seconds = timeout_seconds(request)
        try:
            async with asyncio.timeout(limit_seconds or None):
                await self._write_stream(messages)
        except TimeoutError:
            raise ConnectError("deadline_exceeded", f"the stream's limit of {limit_seconds:g} s is over") from None
        return {}

    async def _write_stream(self, messages: AsyncIterator[Message]) -> None:
        process: RunningProcess | None = None
        async for message in messages:
            if "start" in message:
                process = self._find(_object(message, "start"))
            elif "data" in message:
                if process is None:
                    raise ConnectError("invalid_argument", "the first message must be a start event")
                await self._write(process, _object(_object(message, "data"), "input"))
            elif "keepalive" not in message:
                raise ConnectError("invalid_argument", "a message must be a start, data or keepalive event")

    async def send_signal(self, message: Message, request: Request) -> Message:
        number = _signal_number(message.get("signal"))
        self._find(message).send_signal(number)
        return {}

    async def close_stdin(self, message: Message, request: Request) -> Message:
        await self._find(message).close_stdin()
        return {}

    # Details.

    async def _write(self, process: RunningProcess, given: dict[str, Any]) -> None:
        kind = "pty" if "pty" in given else "stdin"
        encoded = given.get(kind)
        if not isinstance(encoded, str):
            raise ConnectError("invalid_argument", "input needs stdin or pty, in base64")
        try:
            data = a2b_base64(encoded, strict_mode=True)
        except (BinasciiError, ValueError):
            raise ConnectError("invalid_argument", f"{kind} is no base64") from None
        await process.write_input(data, to_terminal=kind == "pty")

    def _environment(self, user: User, config: dict[str, Any], *, has_terminal: bool) -> dict[str, str]:
        environment = {
            "PATH": DEFAULT_PATH,
            "HOME": user.home,
            "USER": user.name,
            "LOGNAME": user.name,
            "SHELL": user.shell,
        }
        if has_terminal:
            environment["TERM"] = "xterm-256color"
        environment.update(self._state.environment)
        given = config.get("envs")
        if given is not None:
            if not isinstance(given, dict):
                raise _wrong("envs", "an object")
            for name, value in cast("dict[str, Any]", given).items():
                if not isinstance(value, str):
                    raise _wrong(f"the variable {name[:100]}", "text")
                environment[name] = value
        return environment

    def _find(self, message: Message, *, with_ended: bool = False) -> RunningProcess:
        """The process of a ProcessSelector, by pid or tag. Raises ConnectError ``not_found``."""
        selector = _object(message, "process")
        if "tag" in selector:
            tag = selector["tag"]
            ended = [process for _, process in self._ended.values()] if with_ended else []
            for process in [*self._running.values(), *ended]:
                if process.tag is not None and process.tag == tag:
                    return process
            raise ConnectError("not_found", f"no process with the tag {str(tag)[:100]!r} runs")
        pid = _integer(selector.get("pid"), "pid")
        process = self._running.get(pid)
        if process is None and with_ended and pid in self._ended:
            process = self._ended[pid][1]
        if process is None:
            raise ConnectError("not_found", f"no process with the pid {pid} runs that was started here")
        return process

    def _on_end(self, process: RunningProcess) -> None:
        del self._running[process.pid]
        self._ended[process.pid] = (time.monotonic(), process)
        self._forget_old()

    def _on_read(self, process: RunningProcess) -> None:
        ended = self._ended.get(process.pid)
        if ended is not None and ended[1] is process:
            del self._ended[process.pid]

    def _forget_old(self) -> None:
        """Keep few of those whose end nobody has read, not for long, and not too much of their output."""
        now = time.monotonic()
        kept_bytes = sum(process.kept_bytes for _, process in self._ended.values())
        for pid, (ended_at, process) in list(self._ended.items()):
            is_old = now - ended_at > _KEEP_ENDED_SECONDS
            if not is_old and len(self._ended) <= _MAX_ENDED and kept_bytes <= _MAX_ENDED_BYTES:
                return
            del self._ended[pid]
            kept_bytes -= process.kept_bytes


def register(router: Router, state: AgentState) -> None:
    ProcessService(state).register(router)


def _wrong(name: str, wanted: str) -> ConnectError:
    return ConnectError("invalid_argument", f"{name} must be {wanted}")


def _object(message: Message, name: str) -> dict[str, Any]:
    value = message.get(name)
    if not isinstance(value, dict):
        raise _wrong(name, "an object")
    return cast("dict[str, Any]", value)


def _integer(value: object, name: str) -> int:
    """A number, or its decimal text: protobuf's JSON allows both."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _wrong(name, "a number")


def _arguments(config: dict[str, Any]) -> list[str]:
    program = config.get("cmd")
    if not isinstance(program, str) or not program:
        raise _wrong("cmd", "the program to start")
    arguments: Any = config.get("args") or []
    if not isinstance(arguments, list):
        raise _wrong("args", "a list of texts")
    words = cast("list[Any]", arguments)
    if not all(isinstance(word, str) for word in words):
        raise _wrong("args", "a list of texts")
    return [program, *words]


def _terminal_size(message: Message) -> tuple[int, int]:
    """(columns, rows) of a message's PTY; 80 by 24 if it names no size."""
    size: Any = _object(message, "pty").get("size") or {}
    if not isinstance(size, dict):
        raise _wrong("size", "an object")
    numbers = cast("dict[str, Any]", size)
    columns = _integer(numbers.get("cols", 80), "cols")
    rows = _integer(numbers.get("rows", 24), "rows")
    if not (0 <= columns <= _MAX_TERMINAL and 0 <= rows <= _MAX_TERMINAL):
        raise _wrong("cols and rows", f"from 0 to {_MAX_TERMINAL}")
    return columns, rows


def _signal_number(value: object) -> int:
    """``SIGNAL_SIGTERM`` (E2B's names), ``SIGTERM`` or a number from 1 to 64."""
    if isinstance(value, str) and not value.isdigit():
        name = value.removeprefix("SIGNAL_")
        number = getattr(signal, name, None) if name.startswith("SIG") and not name.startswith("SIG_") else None
        if not isinstance(number, signal.Signals):
            raise ConnectError("invalid_argument", f"no such signal: {value[:40]!r}")
        return int(number)
    number = _integer(value, "signal")
    if not 1 <= number <= 64:
        raise _wrong("signal", "a signal's name, or a number from 1 to 64")
    return number


def _keepalive_seconds(request: Request) -> float:
    """How long a stream may be silent before a keep-alive is sent (header Keepalive-Ping-Interval, seconds)."""
    value = request.headers.get("keepalive-ping-interval", "")
    if value.isascii() and value.isdigit() and 1 <= int(value[:6]) <= 3600:
        return float(int(value[:6]))
    return _KEEPALIVE_SECONDS
