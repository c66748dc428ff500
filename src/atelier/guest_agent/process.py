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
from collections.abc import AsyncIterator
from typing import Any, Final

from atelier.guest_agent.event_stream import EventStream
from atelier.guest_agent.http import STREAM, Request, Response, Router
from atelier.guest_agent.program_request import (
    INPUT_SECONDS,
    input_of,
    integer,
    object_of,
    start_program,
    terminal_size,
    wrong,
)
from atelier.guest_agent.rpc import (
    STREAM_HEADERS,
    Message,
    add_client_stream,
    add_unary,
    keepalive_seconds,
    read_stream_request,
    timeout_seconds,
)
from atelier.guest_agent.running_process import RunningProcess
from atelier.guest_agent.state import AgentState
from atelier.guest_protocol.connect import ConnectError

SERVICE: Final = "/process.Process/"

_MAX_ENDED: Final = 64
_MAX_ENDED_BYTES: Final = 16 * 1024 * 1024
_KEEP_ENDED_SECONDS: Final = 600.0


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
        tag = message.get("tag")
        if tag is not None and not isinstance(tag, str):
            raise wrong("tag", "text")
        spawned, config = start_program(message, self._state, self._state.user_of(request))
        process = RunningProcess(spawned, config, tag, self._on_end, self._on_read)
        self._ended.pop(process.pid, None)
        self._running[process.pid] = process
        if limit_seconds:
            process.set_time_limit(limit_seconds)
        return Response(200, STREAM_HEADERS, process.attach(keepalive_seconds(request), replay=False))

    async def connect(self, request: Request) -> Response:
        message = await read_stream_request(request)
        limit_seconds = timeout_seconds(request)
        process = self._find(message, with_ended=True)
        stream: EventStream = process.attach(keepalive_seconds(request), replay=True)
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
            process.resize(*terminal_size(message))
        return {}

    async def send_input(self, message: Message, request: Request) -> Message:
        limit_seconds = timeout_seconds(request) or INPUT_SECONDS
        try:
            async with asyncio.timeout(limit_seconds):
                await self._write(self._find(message), object_of(message, "input"))
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
                process = self._find(object_of(message, "start"))
            elif "data" in message:
                if process is None:
                    raise ConnectError("invalid_argument", "the first message must be a start event")
                await self._write(process, object_of(object_of(message, "data"), "input"))
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
        kind, data = input_of(given)
        await process.write_input(data, to_terminal=kind == "pty")

    def _find(self, message: Message, *, with_ended: bool = False) -> RunningProcess:
        """The process of a ProcessSelector, by pid or tag. Raises ConnectError ``not_found``."""
        selector = object_of(message, "process")
        if "tag" in selector:
            tag = selector["tag"]
            ended = [process for _, process in self._ended.values()] if with_ended else []
            for process in [*self._running.values(), *ended]:
                if process.tag is not None and process.tag == tag:
                    return process
            raise ConnectError("not_found", f"no process with the tag {str(tag)[:100]!r} runs")
        pid = integer(selector.get("pid"), "pid")
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


def _signal_number(value: object) -> int:
    """``SIGNAL_SIGTERM`` (E2B's names), ``SIGTERM`` or a number from 1 to 64."""
    if isinstance(value, str) and not value.isdigit():
        name = value.removeprefix("SIGNAL_")
        number = getattr(signal, name, None) if name.startswith("SIG") and not name.startswith("SIG_") else None
        if not isinstance(number, signal.Signals):
            raise ConnectError("invalid_argument", f"no such signal: {value[:40]!r}")
        return int(number)
    number = integer(value, "signal")
    if not 1 <= number <= 64:
        raise wrong("signal", "a signal's name, or a number from 1 to 64")
    return number
