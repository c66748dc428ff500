"""The routes of the manager, said once and without I/O: what is sent, and how the answer is read. What changes a
sandbox that exists, and the host, stands in ``lifecycle_calls.py``.

``connection.py`` carries a ``Call`` out, blocking or on asyncio; ``sandbox.py`` and ``files.py`` give it to people.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from atelier.client.addresses import RemotePath, encode_query, encode_segment, path_to_bytes
from atelier.client.call import (
    ANSWER_TIMEOUT_SECONDS,
    API,
    WAIT_AT_MOST_SECONDS,
    Call,
    LineStream,
    is_no_content,
    make_body,
    make_patch,
    read_bytes,
    read_model,
    read_nothing,
    sandbox_path,
    wait_query,
)
from atelier.client.errors import error_from_body, not_understood
from atelier.client.network_calls import PolicyWish, to_policy
from atelier.model.errors import InvalidRequestError
from atelier.model.guest import ProcessEnded, ProcessEvent, ProcessOutput, ProcessStarted
from atelier.schemas.errors import ErrorBody
from atelier.schemas.files import FileEntry, FileList, MoveRequest
from atelier.schemas.health import Health
from atelier.schemas.images import BuildDoneEvent, BuildEvent, BuildImageRequest, BuildProgressEvent, ImageList
from atelier.schemas.processes import (
    EndedEvent,
    ExecEvent,
    ExecRequest,
    FailedEvent,
    OutputEvent,
    ProcessList,
    RunRequest,
    RunResult,
    SignalRequest,
    StartedEvent,
)
from atelier.schemas.sandboxes import CreateSandboxRequest, Sandbox, SandboxMetrics, SandboxPage

Command = str | Sequence[str]
"""A program with its arguments; a text is given to ``sh -c`` in the sandbox."""

_EXEC_EVENT: TypeAdapter[ExecEvent] = TypeAdapter(ExecEvent)
_BUILD_EVENT: TypeAdapter[BuildEvent] = TypeAdapter(BuildEvent)


# -- the manager itself --------------------------------------------------------------------------------------------


def health() -> Call[Health]:
    return Call(
        "ask for the manager's health", "GET", "/health", read_model(Health, "read its health"), repeatable=True
    )


def list_images() -> Call[ImageList]:
    return Call("list the images", "GET", f"{API}/images", read_model(ImageList, "list the images"), repeatable=True)


def build_image(name: str, *, refresh: bool) -> LineStream[BuildProgressEvent | BuildDoneEvent]:
    operation = f"build the image {name}"

    def parse(line: bytes) -> BuildProgressEvent | BuildDoneEvent:
        try:
            event = _BUILD_EVENT.validate_json(line)
        except ValidationError as error:
            raise not_understood(operation, error) from error
        if isinstance(event, FailedEvent):
            raise error_from_body(ErrorBody(code=event.code, message=event.message, hint=event.hint))
        return event

    path = f"{API}/images/{encode_segment(name, 'image')}/build"
    return LineStream(operation, "POST", path, parse, make_body(BuildImageRequest, operation, refresh=refresh))


def events_path(sandbox: str) -> str:
    return f"{API}/events" + encode_query([("sandbox", sandbox)] if sandbox else [])


# -- sandboxes -----------------------------------------------------------------------------------------------------


def create_sandbox(
    *,
    name: str | None,
    image: str | None,
    vcpu_count: int | None,
    memory_mib: int | None,
    disk_mib: int | None,
    environment: Mapping[str, str] | None,
    labels: Mapping[str, str] | None,
    wait_seconds: float,
    auto_stop_after_idle_seconds: int | None = None,
    expires_at: datetime | None = None,
    network: PolicyWish | None = None,
    snapshot: str | None = None,
    disk_only: bool = False,
) -> Call[Sandbox]:
    """Ask for a sandbox. With ``wait_seconds`` > 0 the answer comes when it runs or has failed, or after that time."""
    operation = f"create the sandbox {name}" if name else "create a sandbox"
    asked = {
        "name": name,
        "image": image,
        "vcpu_count": vcpu_count,
        "memory_mib": memory_mib,
        "disk_mib": disk_mib,
        "environment": dict(environment) if environment else None,
        "labels": dict(labels) if labels else None,
        "auto_stop_after_idle_seconds": auto_stop_after_idle_seconds,
        "expires_at": expires_at,
        "network": None if network is None else to_policy(network, operation),
        "snapshot": snapshot,
        "disk_only": disk_only or None,
    }
    # What is the default without a snapshot is a choice with one.
    make = make_body if snapshot is None else make_patch
    body = make(CreateSandboxRequest, operation, **{key: value for key, value in asked.items() if value is not None})
    wait_seconds = min(wait_seconds, WAIT_AT_MOST_SECONDS)
    return Call(
        operation,
        "POST",
        f"{API}/sandboxes{wait_query(wait_seconds)}",
        read_model(Sandbox, operation),
        body,
        read_timeout_seconds=wait_seconds + ANSWER_TIMEOUT_SECONDS,
    )


def list_sandboxes(
    *,
    limit: int | None = None,
    cursor: str | None = None,
    state: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Call[SandboxPage]:
    query: list[tuple[str, str | bytes | int]] = []
    if limit is not None:
        query.append(("limit", limit))
    if cursor is not None:
        query.append(("cursor", cursor))
    if state is not None:
        query.append(("state", state))
    query.extend(("label", f"{key}={value}") for key, value in (labels or {}).items())
    operation = "list the sandboxes"
    return Call(
        operation, "GET", f"{API}/sandboxes{encode_query(query)}", read_model(SandboxPage, operation), repeatable=True
    )


def get_sandbox(sandbox: str) -> Call[Sandbox]:
    operation = f"look up the sandbox {sandbox}"
    return Call(operation, "GET", sandbox_path(sandbox), read_model(Sandbox, operation), repeatable=True)


def delete_sandbox(sandbox: str, *, wait: bool) -> Call[bool]:
    """True: nothing of it is left. False: it is being destroyed."""
    path = sandbox_path(sandbox) + wait_query(WAIT_AT_MOST_SECONDS if wait else 0)
    timeout = WAIT_AT_MOST_SECONDS + ANSWER_TIMEOUT_SECONDS
    return Call(f"remove the sandbox {sandbox}", "DELETE", path, is_no_content, read_timeout_seconds=timeout)


def get_metrics(sandbox: str) -> Call[SandboxMetrics]:
    operation = f"measure the sandbox {sandbox}"
    return Call(
        operation, "GET", sandbox_path(sandbox, "/metrics"), read_model(SandboxMetrics, operation), repeatable=True
    )


def read_console(sandbox: str, *, limit_bytes: int | None) -> Call[bytes]:
    query = encode_query([("limit_bytes", limit_bytes)] if limit_bytes is not None else [])
    path = sandbox_path(sandbox, f"/console{query}")
    return Call(f"read the console of {sandbox}", "GET", path, read_bytes, repeatable=True)


# -- processes -----------------------------------------------------------------------------------------------------


def to_arguments(command: Command) -> list[str]:
    return ["sh", "-c", command] if isinstance(command, str) else list(command)


def exec_process(
    sandbox: str,
    command: Command,
    *,
    environment: Mapping[str, str] | None,
    working_directory: str,
    user: str,
    timeout_seconds: float | None,
    stdin: bool,
) -> LineStream[ProcessEvent]:
    arguments = to_arguments(command)
    operation = f"run {_shown(arguments)} in {sandbox}"
    body = make_body(
        ExecRequest,
        operation,
        command=arguments,
        environment=dict(environment or {}),
        working_directory=working_directory,
        user=user,
        timeout_seconds=timeout_seconds,
        stdin=stdin,
    )
    return LineStream(operation, "POST", sandbox_path(sandbox, "/exec"), process_event_parser(operation), body)


def attach_process(sandbox: str, pid: int) -> LineStream[ProcessEvent]:
    operation = f"attach to process {pid} in {sandbox}"
    return LineStream(operation, "GET", _process(sandbox, pid, "/output"), process_event_parser(operation))


def run_process(
    sandbox: str,
    command: Command,
    *,
    environment: Mapping[str, str] | None,
    working_directory: str,
    user: str,
    timeout_seconds: float | None,
    input: str | bytes | None,
    encoding: Literal["utf-8", "base64"],
    output_limit_bytes: int | None,
) -> Call[RunResult]:
    arguments = to_arguments(command)
    operation = f"run {_shown(arguments)} in {sandbox}"
    fields: dict[str, object] = {
        "command": arguments,
        "environment": dict(environment or {}),
        "working_directory": working_directory,
        "user": user,
        "timeout_seconds": timeout_seconds,
        "encoding": encoding,
    }
    if isinstance(input, bytes):
        fields["input_base64"] = base64.b64encode(input).decode("ascii")
    elif input is not None:
        fields["input"] = input
    if output_limit_bytes is not None:
        fields["output_limit_bytes"] = output_limit_bytes
    body = make_body(RunRequest, operation, **fields)
    read_timeout = None if timeout_seconds is None else timeout_seconds + ANSWER_TIMEOUT_SECONDS
    path = sandbox_path(sandbox, "/run")
    return Call(operation, "POST", path, read_model(RunResult, operation), body, read_timeout_seconds=read_timeout)


def list_processes(sandbox: str) -> Call[ProcessList]:
    operation = f"list the processes of {sandbox}"
    return Call(
        operation, "GET", sandbox_path(sandbox, "/processes"), read_model(ProcessList, operation), repeatable=True
    )


def send_input(sandbox: str, pid: int, data: bytes) -> Call[None]:
    """Write to a process's stdin. Waits, without limit, until the process has taken it."""
    path = _process(sandbox, pid, "/stdin")
    operation = f"send input to process {pid} in {sandbox}"
    return Call(operation, "POST", path, read_nothing, data, headers=_OCTETS, read_timeout_seconds=None)


def close_input(sandbox: str, pid: int) -> Call[None]:
    operation = f"close the input of process {pid} in {sandbox}"
    return Call(operation, "DELETE", _process(sandbox, pid, "/stdin"), read_nothing)


def send_signal(sandbox: str, pid: int, signal: str | int) -> Call[None]:
    operation = f"send {signal} to process {pid} in {sandbox}"
    body = make_body(SignalRequest, operation, signal=signal)
    return Call(operation, "POST", _process(sandbox, pid, "/signal"), read_nothing, body)


def process_event_parser(operation: str) -> Callable[[bytes], ProcessEvent]:
    """Reads one line of a process's stream; raises the error that a ``failed`` line tells of."""

    def parse(line: bytes) -> ProcessEvent:
        try:
            event = _EXEC_EVENT.validate_json(line)
            match event:
                case StartedEvent():
                    return ProcessStarted(event.pid)
                case OutputEvent():
                    return ProcessOutput(event.stream, base64.b64decode(event.data, validate=True))
                case EndedEvent():
                    return ProcessEnded(event.exit_code, event.status, event.error)
                case FailedEvent():
                    pass
        except ValueError as error:
            raise not_understood(operation, error) from error
        raise error_from_body(ErrorBody(code=event.code, message=event.message, hint=event.hint))

    return parse


# -- files ---------------------------------------------------------------------------------------------------------


def files_path(sandbox: str, path: RemotePath, user: str, below: str = "") -> str:
    """The address of a file's content (``below`` empty) or of what can be asked of a path (``/stat``, ``/archive``)."""
    return sandbox_path(sandbox, f"/files{below}") + _path_query(path, user)


def read_file(sandbox: str, path: RemotePath, user: str, offset: int, length: int | None) -> Call[bytes]:
    if offset < 0 or (length is not None and length < 1):
        raise InvalidRequestError(
            f"cannot read {length} bytes from {offset} on", code="invalid_range", hint="offset >= 0, length >= 1"
        )
    headers: dict[str, str] = {}
    if offset or length is not None:
        headers["Range"] = f"bytes={offset}-" if length is None else f"bytes={offset}-{offset + length - 1}"
    operation = f"read {shown_path(path)} in {sandbox}"
    return Call(
        operation,
        "GET",
        files_path(sandbox, path, user),
        read_bytes,
        headers=headers,
        read_timeout_seconds=None,
        repeatable=True,
    )


def write_file(
    sandbox: str, path: RemotePath, user: str, data: bytes | None, size_bytes: int | None = None
) -> Call[FileEntry]:
    """``data`` None: the content is streamed by whoever sends the call, ``size_bytes`` long if that is known."""
    operation = f"write {shown_path(path)} in {sandbox}"
    headers = _OCTETS if size_bytes is None else {**_OCTETS, "Content-Length": str(size_bytes)}
    return Call(
        operation,
        "PUT",
        files_path(sandbox, path, user),
        read_model(FileEntry, operation),
        data,
        headers=headers,
        read_timeout_seconds=None,
    )


def write_archive(sandbox: str, path: RemotePath, user: str) -> Call[None]:
    operation = f"copy a folder to {shown_path(path)} in {sandbox}"
    address = files_path(sandbox, path, user, "/archive")
    return Call(
        operation,
        "PUT",
        address,
        read_nothing,
        headers={"Content-Type": "application/x-tar"},
        read_timeout_seconds=None,
    )


def stat_file(sandbox: str, path: RemotePath, user: str) -> Call[FileEntry]:
    operation = f"look at {shown_path(path)} in {sandbox}"
    return Call(
        operation, "GET", files_path(sandbox, path, user, "/stat"), read_model(FileEntry, operation), repeatable=True
    )


def list_directory(sandbox: str, path: RemotePath, user: str, depth: int) -> Call[FileList]:
    operation = f"list {shown_path(path)} in {sandbox}"
    address = sandbox_path(sandbox, "/files/list") + _path_query(path, user, ("depth", depth))
    return Call(operation, "GET", address, read_model(FileList, operation), repeatable=True)


def remove_file(sandbox: str, path: RemotePath, user: str) -> Call[None]:
    operation = f"remove {shown_path(path)} in {sandbox}"
    return Call(operation, "DELETE", files_path(sandbox, path, user), read_nothing, read_timeout_seconds=300.0)


def make_directory(sandbox: str, path: RemotePath, user: str) -> Call[FileEntry]:
    operation = f"make the folder {shown_path(path)} in {sandbox}"
    return Call(operation, "POST", files_path(sandbox, path, user, "/directory"), read_model(FileEntry, operation))


def move_file(sandbox: str, source: RemotePath, destination: RemotePath, user: str) -> Call[FileEntry]:
    operation = f"move {shown_path(source)} to {shown_path(destination)} in {sandbox}"
    body = make_body(MoveRequest, operation, source=_text(source), destination=_text(destination), user=user)
    return Call(operation, "POST", sandbox_path(sandbox, "/files/move"), read_model(FileEntry, operation), body)


def shown_path(path: RemotePath) -> str:
    return path_to_bytes(path).decode("utf-8", "backslashreplace")


# -- pieces --------------------------------------------------------------------------------------------------------

_OCTETS = {"Content-Type": "application/octet-stream"}


def _process(sandbox: str, pid: int, below: str) -> str:
    return sandbox_path(sandbox, f"/processes/{pid}{below}")


def _path_query(path: RemotePath, user: str, *more: tuple[str, str | bytes | int]) -> str:
    query: list[tuple[str, str | bytes | int]] = [("path", path_to_bytes(path)), *more]
    if user:
        query.append(("user", user))
    return encode_query(query)


def _text(path: RemotePath) -> str:
    try:
        return path_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{shown_path(path)} cannot be moved: its name is no UTF-8",
            code="invalid_path",
            hint="move it with a program in the sandbox: run(['mv', ...])",
        ) from error


def _shown(arguments: Sequence[str]) -> str:
    return arguments[0] if arguments else "nothing"
