"""``atelier exec`` at work: program output to stdout and stderr, stdin into the program, signals passed on.

Called by ``commands/exec.py``. Blocking reads of stdin happen in a daemon thread, since stdin may be anything (a file,
a pipe that never ends) and must never keep this process from ending when the program has.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from atelier.cli.output import print_note, printable
from atelier.client import calls
from atelier.client.connection import AsyncConnection, AsyncConnectionLease
from atelier.client.environment import Endpoint
from atelier.client.processes import AsyncExecution
from atelier.model.errors import AtelierError, TransientError
from atelier.model.guest import ProcessEnded, ProcessOutput
from atelier.schemas.processes import EndedEvent, OutputEvent, StartedEvent

EXIT_EXEC_FAILED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
_STDIN_PIECE_BYTES = 256 * 1024
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_IMPATIENCE_SECONDS = 3.0
_IMPATIENT_INTERRUPTS = 3


@dataclass(frozen=True, slots=True)
class ExecOptions:
    """What the user asked for; ``stdin`` says whether this process's stdin is streamed into the program."""

    sandbox: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    working_directory: str = ""
    user: str = ""
    timeout_seconds: float | None = None
    stdin: bool = False
    as_json: bool = False


def exit_status(exit_code: int) -> int:
    """The program's exit code as this process can pass it on: 0 to 255, and 0 only for 0."""
    status = exit_code & 0xFF
    return status if status or exit_code == 0 else 1


def status_of_failure(error: AtelierError) -> int:
    """What exec ends with when the program could not be started: the shell's 126 and 127 where the guest says so."""
    return {"program_not_found": EXIT_NOT_FOUND, "program_not_executable": EXIT_NOT_EXECUTABLE}.get(
        error.code, EXIT_EXEC_FAILED
    )


async def run_exec(endpoint: Endpoint, options: ExecOptions) -> int:
    """Run the program; return the status with which ``atelier exec`` ends. Raises AtelierError when exec itself fails."""
    async with AsyncConnection(endpoint) as connection:
        stream = calls.exec_process(
            options.sandbox,
            options.command,
            environment=options.environment,
            working_directory=options.working_directory,
            user=options.user,
            timeout_seconds=options.timeout_seconds,
            stdin=options.stdin,
        )
        lease = AsyncConnectionLease(endpoint, connection)
        async with await AsyncExecution(lease, options.sandbox, stream).begin() as execution:
            return await _Relay(execution, options).run()


class _Relay:
    """One execution that is under way."""

    def __init__(self, execution: AsyncExecution, options: ExecOptions) -> None:
        self._execution = execution
        self._options = options
        self._interrupts: list[float] = []
        self._signalling: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        output = asyncio.create_task(self._show_output())
        pump = asyncio.create_task(self._pump_stdin()) if self._options.stdin else None
        loop = asyncio.get_running_loop()
        # What is ignored stays ignored: nohup and background jobs mean it.
        handled = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
        for number in handled:
            loop.add_signal_handler(number, self._forward, number)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            handled.append(signal.SIGINT)
            loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        try:
            waited = {output} if pump is None else {output, pump}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if pump is not None and pump.done() and not output.done():
                pump.result()  # input was lost on the way: raises, and the program's result would be a lie
            return await output
        except BrokenPipeError:
            # As a local program would end whose reader has gone.
            await self._send(signal.SIGPIPE)
            _discard_stdout()
            return EXIT_BROKEN_PIPE
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
            await _end(output, pump, *self._signalling)

    async def _show_output(self) -> int:
        async for event in self._execution:
            if self._options.as_json:
                await asyncio.to_thread(_write, sys.stdout.buffer, _as_line(event))
            elif isinstance(event, ProcessOutput):
                target = sys.stderr.buffer if event.stream == "stderr" else sys.stdout.buffer
                # In a thread: a reader that stands still must not keep signals and input from being passed on.
                await asyncio.to_thread(_write, target, event.data)
            if isinstance(event, ProcessEnded):
                if event.error == "timeout" and not self._options.as_json:
                    print_note(f"error: the time limit of {self._options.timeout_seconds:g} s ended the program")
                elif event.error and not self._options.as_json:
                    print_note(f"error: the program ended: {printable(event.error)}")
                return exit_status(event.exit_code)
        raise AssertionError("an execution's events end with ProcessEnded or an error")

    async def _pump_stdin(self) -> None:
        pieces = _read_stdin()
        try:
            while piece := await pieces.get():
                await self._execution.write_stdin(piece)
            await self._execution.close_stdin()
        except TransientError:
            raise
        except AtelierError:
            # The program has ended or closed its input, as a reader may; what it answers with is shown all the same.
            return

    def _on_interrupt(self) -> None:
        now = time.monotonic()
        self._interrupts = [at for at in self._interrupts if now - at < _IMPATIENCE_SECONDS] + [now]
        if len(self._interrupts) >= _IMPATIENT_INTERRUPTS:
            print_note(f"left; process {self._execution.pid} may still run in {self._options.sandbox}")
            # At once: a thread may hang in a write to a reader that stands still, and nothing here needs an end.
            os._exit(EXIT_INTERRUPTED)
        self._forward(signal.SIGINT)

    def _forward(self, number: signal.Signals) -> None:
        task = asyncio.create_task(self._send(number))
        self._signalling.add(task)
        task.add_done_callback(self._signalling.discard)

    async def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(AtelierError):
            await self._execution.send_signal(number.name)


async def _end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel those that are still under way and wait for them: as long as one of them reads the stream, it cannot be
    closed. What they raise was told, or came too late to matter."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _as_line(event: object) -> bytes:
    """The event in the API's own form, one line of JSON."""
    import base64

    from atelier.model.guest import ProcessStarted

    match event:
        case ProcessStarted():
            model = StartedEvent(pid=event.pid)
        case ProcessOutput():
            model = OutputEvent(stream=event.stream, data=base64.b64encode(event.data).decode("ascii"))
        case ProcessEnded():
            model = EndedEvent(exit_code=event.exit_code, status=event.status, error=event.error)
        case _:
            raise TypeError(type(event))
    return model.model_dump_json().encode() + b"\n"


def _write(target: BinaryIO, data: bytes) -> None:
    target.write(data)
    target.flush()


def _discard_stdout() -> None:
    """Nobody reads any more: what is still buffered must not raise once more when the interpreter ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _read_stdin() -> asyncio.Queue[bytes]:
    """Pieces of stdin, then an empty one. At most two wait here: the program's pace is the pace of reading."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[bytes] = asyncio.Queue(2)

    def read() -> None:
        descriptor = sys.stdin.fileno()
        piece = b"begin"
        while piece:
            try:
                piece = os.read(descriptor, _STDIN_PIECE_BYTES)
            except OSError:
                piece = b""
            try:
                asyncio.run_coroutine_threadsafe(pieces.put(piece), loop).result()
            except (RuntimeError, concurrent.futures.CancelledError):
                return  # the loop has ended

    threading.Thread(target=read, name="stdin", daemon=True).start()
    return pieces
