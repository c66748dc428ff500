"""Processes in a sandbox: streamed and collected runs, input, signals."""

from __future__ import annotations

import base64
import signal
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import StreamingResponse

from atelier.api.parameters import session_of
from atelier.api.rendering import render_events, render_process
from atelier.api.streams import NDJSON, begun, ndjson, unless_disconnected
from atelier.model.errors import InvalidRequestError
from atelier.model.guest import ProcessSpec
from atelier.schemas.processes import ExecEvent, ExecRequest, ProcessList, RunRequest, RunResult, SignalRequest
from atelier.services.guest_sessions import GuestSession

router = APIRouter(prefix="/sandboxes/{sandbox}", tags=["processes"])

Session = Annotated[GuestSession, Depends(session_of)]
ProcessId = Annotated[int, Path(ge=1, le=2**31 - 1)]
_EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"model": ExecEvent, "content": {NDJSON: {}}, "description": "One event per line."}
}
_INPUT_LIMIT_BYTES = 32 * 1024 * 1024


def _spec(body: ExecRequest, *, stdin: bool) -> ProcessSpec:
    return ProcessSpec(
        arguments=tuple(body.command),
        environment=body.environment,
        working_directory=body.working_directory,
        user=body.user,
        stdin=stdin,
        timeout_seconds=body.timeout_seconds,
    )


@router.post(
    "/exec",
    operation_id="exec_process",
    response_class=StreamingResponse,
    responses=_EVENT_STREAM,
)
async def exec_process(session: Session, body: ExecRequest) -> StreamingResponse:
    """Start a program and stream what it writes, as NDJSON: `started`, `output` (base64), then `ended` or `failed`.
    A client that goes away does not end the program; `.../processes/{pid}/output` attaches to it again."""
    return ndjson(render_events(await begun(session.stream(_spec(body, stdin=body.stdin)))))


@router.post("/run", operation_id="run_process")
async def run_process(request: Request, session: Session, body: RunRequest) -> RunResult:
    """Run a program to its end and answer with all that it wrote. A client that goes away kills it."""
    data = _input_of(body)
    spec = _spec(body, stdin=data is not None)
    outcome = await unless_disconnected(request, lambda: session.run(spec, data, body.output_limit_bytes))

    def text(piece: bytes) -> str:
        return base64.b64encode(piece).decode() if body.encoding == "base64" else piece.decode(errors="replace")

    return RunResult(
        exit_code=outcome.exit_code,
        stdout=text(outcome.stdout),
        stderr=text(outcome.stderr),
        stdout_truncated=outcome.stdout_truncated,
        stderr_truncated=outcome.stderr_truncated,
        error=outcome.error,
    )


def _input_of(body: RunRequest) -> bytes | None:
    if body.input_base64 is None:
        return None if body.input is None else body.input.encode()
    try:
        return base64.b64decode(body.input_base64, validate=True)
    except ValueError as error:
        raise InvalidRequestError("input_base64 is no base64", hint="or send text as input") from error


@router.get("/processes", operation_id="list_processes")
async def list_processes(session: Session) -> ProcessList:
    """Processes that were started through the API and still run."""
    processes = await session.driver.list_processes(session.sandbox_id)
    return ProcessList(items=[render_process(process) for process in processes])


@router.get(
    "/processes/{pid}/output",
    operation_id="attach_process",
    response_class=StreamingResponse,
    responses=_EVENT_STREAM,
)
async def attach_process(session: Session, pid: ProcessId) -> StreamingResponse:
    """Attach to a process: its newest kept output, then what follows, in the form of `exec`."""
    return ndjson(render_events(await begun(session.attach(pid))))


@router.post("/processes/{pid}/stdin", operation_id="send_stdin", status_code=204)
async def send_stdin(request: Request, session: Session, pid: ProcessId) -> Response:
    """Write the body's bytes to the process's stdin."""
    sent = 0
    async for piece in request.stream():
        sent += len(piece)
        if sent > _INPUT_LIMIT_BYTES:
            raise InvalidRequestError("one request carries at most 32 MiB of input", code="body_too_large")
        if piece:
            await session.driver.send_input(session.sandbox_id, pid, piece)
    return Response(status_code=204)


@router.delete("/processes/{pid}/stdin", operation_id="close_stdin", status_code=204)
async def close_stdin(session: Session, pid: ProcessId) -> Response:
    """Close the process's stdin: it reads end-of-file."""
    await session.driver.close_input(session.sandbox_id, pid)
    return Response(status_code=204)


@router.post("/processes/{pid}/signal", operation_id="send_signal", status_code=204)
async def send_signal(session: Session, pid: ProcessId, body: SignalRequest) -> Response:
    """Send a signal to the process and its group."""
    await session.driver.send_signal(session.sandbox_id, pid, _signal_number(body.signal))
    return Response(status_code=204)


def _signal_number(given: str | int) -> int:
    if isinstance(given, int) or (given.isascii() and given.isdigit() and len(given) <= 2):
        number = int(given)
        if 1 <= number <= 64:
            return number
    else:
        name = given.upper() if given.upper().startswith("SIG") else f"SIG{given.upper()}"
        if name in signal.Signals.__members__:
            return signal.Signals[name].value
    raise InvalidRequestError(
        f"there is no signal {str(given)[:40]!r}", hint="use a name like SIGTERM, or a number from 1 to 64"
    )
