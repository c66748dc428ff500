"""Create, list, show, stop, start, pause, resume, resize and destroy sandboxes; their console and figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from atelier.api.authorisation import Caller
from atelier.api.idempotency import Once
from atelier.api.parameters import (
    LabelFilter,
    PageCursor,
    PageLimit,
    SandboxReference,
    WaitSeconds,
    looking_session_of,
    parse_label_filter,
    services_of,
)
from atelier.api.rendering import parse_network_policy, render_sandbox
from atelier.model import sandbox as sandbox_model
from atelier.model.errors import InvalidRequestError
from atelier.model.network_policy import OPEN_POLICY
from atelier.model.sandbox import SandboxSpec
from atelier.model.states import UNDER_WAY, SandboxState
from atelier.schemas.sandboxes import (
    ChangeSandboxRequest,
    CreateSandboxRequest,
    ResizeRequest,
    ResumeRequest,
    Sandbox,
    SandboxMetrics,
    SandboxPage,
    StopRequest,
)
from atelier.services.guest_sessions import GuestSession

router = APIRouter(prefix="/sandboxes", tags=["sandboxes"])

_ENDED: dict[int | str, dict[str, Any]] = {200: {"model": Sandbox, "description": "It has ended."}}


@router.post(
    "",
    operation_id="create_sandbox",
    status_code=202,
    responses={201: {"model": Sandbox, "description": "It is running, or failed."}},
)
async def create_sandbox(
    request: Request,
    response: Response,
    caller: Caller,
    once: Once,
    body: CreateSandboxRequest,
    wait: bool = False,
    timeout_seconds: WaitSeconds = 120,
) -> Sandbox:
    """Create a sandbox. Answers 202 at once; with `wait=true` 201 when it is `running` or `failed`, or 202 when
    neither has come true within `timeout_seconds` (the creation goes on)."""
    service = services_of(request).sandboxes
    spec = SandboxSpec(
        image=body.image,
        vcpu_count=body.vcpu_count,
        memory_mib=body.memory_mib,
        disk_mib=body.disk_mib,
        environment=body.environment,
        labels=body.labels,
        auto_stop_after_idle_seconds=body.auto_stop_after_idle_seconds,
        expires_at=body.expires_at,
        owner_id=caller.user_id,
    )
    policy = parse_network_policy(body.network) if body.network is not None else OPEN_POLICY

    async def create() -> list[str]:
        if body.snapshot is None:
            return [(await service.create(body.name, spec, policy)).id]
        visible = services_of(request).access.find_snapshot(caller, body.snapshot, as_owner=False)
        snapshot, its_spec = await services_of(request).snapshots.begin_from(
            visible, spec, body.model_fields_set, disk_only=body.disk_only
        )
        row = await service.create(body.name, its_spec, policy, snapshot_id=snapshot.id, disk_only=body.disk_only)
        return [row.id]

    if body.snapshot is None and body.disk_only:
        raise InvalidRequestError("disk_only says how to begin from a snapshot, and none is given", hint="name one")
    (sandbox_id,) = await once(body, create)
    request.state.subject = sandbox_id
    row = service.get(sandbox_id)
    if wait:
        row, _ = await service.wait_settled(row.id, timeout_seconds)
        if row.state is not SandboxState.CREATING:
            response.status_code = 201
    return render_sandbox(row)


class _Settling:
    """What the routes that begin something have in common: whether to wait for its end, and the answer."""

    def __init__(
        self, request: Request, response: Response, wait: bool = False, timeout_seconds: WaitSeconds = 120
    ) -> None:
        self.sandboxes = services_of(request).sandboxes
        self._response = response
        self._wait_seconds = timeout_seconds if wait else None

    async def answer(self, row: sandbox_model.Sandbox) -> Sandbox:
        """The row, once nothing is under way (then 200), or as it is when the time to wait is over."""
        if self._wait_seconds is not None:
            row, has_settled = await self.sandboxes.wait_settled(row.id, self._wait_seconds)
            # A sandbox keeps its state while it is resized.
            if has_settled and row.state not in UNDER_WAY:
                self._response.status_code = 200
        return render_sandbox(row)


Settling = Annotated[_Settling, Depends()]


@router.post("/{sandbox}/start", operation_id="start_sandbox", status_code=202, responses=_ENDED)
async def start_sandbox(settling: Settling, sandbox: SandboxReference) -> Sandbox:
    """Boot a stopped or failed sandbox from its disk, under the same name. Answers 202 at once; with `wait=true` 200
    when it is `running`, or `failed` again."""
    return await settling.answer(await settling.sandboxes.start(sandbox))


@router.post("/{sandbox}/stop", operation_id="stop_sandbox", status_code=202, responses=_ENDED)
async def stop_sandbox(settling: Settling, sandbox: SandboxReference, body: StopRequest | None = None) -> Sandbox:
    """Shut a running sandbox down; its disk, name and labels stay. A guest that does not end within `grace_seconds` is
    cut off, which `stop_reason` then says. Answers 202 at once; with `wait=true` 200 when it is `stopped`."""
    return await settling.answer(await settling.sandboxes.stop(sandbox, body.grace_seconds if body else None))


@router.post("/{sandbox}/restart", operation_id="restart_sandbox", status_code=202, responses=_ENDED)
async def restart_sandbox(settling: Settling, sandbox: SandboxReference, body: StopRequest | None = None) -> Sandbox:
    """Stop a running sandbox and start it again, as one piece of work. Answers 202 at once; with `wait=true` 200 when
    it is `running` again, or `failed`."""
    return await settling.answer(
        await settling.sandboxes.stop(sandbox, body.grace_seconds if body else None, then_start=True)
    )


@router.post("/{sandbox}/pause", operation_id="pause_sandbox", status_code=202, responses=_ENDED)
async def pause_sandbox(settling: Settling, sandbox: SandboxReference) -> Sandbox:
    """Put a running sandbox on disk, its memory included; its processes go on where they stood when it is resumed, and
    any use of it resumes it. Answers 202 at once; with `wait=true` 200 when it is `paused`, or `running` on with a
    `failure`."""
    return await settling.answer(await settling.sandboxes.pause(sandbox))


@router.post("/{sandbox}/resume", operation_id="resume_sandbox", status_code=202, responses=_ENDED)
async def resume_sandbox(settling: Settling, sandbox: SandboxReference, body: ResumeRequest | None = None) -> Sandbox:
    """Let a paused sandbox go on where it stood. Answers 202 at once; with `wait=true` 200 when it is `running`, `paused`
    still with a `failure`, or `failed`."""
    return await settling.answer(
        await settling.sandboxes.resume(sandbox, from_disk=body is not None and body.from_disk)
    )


@router.post("/{sandbox}/resize", operation_id="resize_sandbox", status_code=202, responses=_ENDED)
async def resize_sandbox(settling: Settling, sandbox: SandboxReference, body: ResizeRequest) -> Sandbox:
    """Grow the disk of a running or stopped sandbox, and the file system on it (of a stopped one at its next start).
    A disk cannot shrink. Answers 202 at once; with `wait=true` 200 when it is done."""
    return await settling.answer(await settling.sandboxes.resize(sandbox, body.disk_mib))


@router.post("/{sandbox}/retry", operation_id="retry_sandbox", status_code=202, responses=_ENDED)
async def retry_sandbox(settling: Settling, sandbox: SandboxReference) -> Sandbox:
    """Try again what is stuck with a sandbox (its `failure` says so), once what was in the way is mended."""
    return await settling.answer(await settling.sandboxes.retry(sandbox))


@router.patch("/{sandbox}", operation_id="change_sandbox")
async def change_sandbox(request: Request, sandbox: SandboxReference, body: ChangeSandboxRequest) -> Sandbox:
    """Change a sandbox's time limits, as to let it live longer."""
    given = body.model_fields_set

    def change(spec: SandboxSpec) -> SandboxSpec:
        if "expires_at" in given:
            spec = replace(spec, expires_at=body.expires_at)
        if "auto_stop_after_idle_seconds" in given:
            spec = replace(spec, auto_stop_after_idle_seconds=body.auto_stop_after_idle_seconds)
        return spec

    return render_sandbox(await services_of(request).sandboxes.set_time_limits(sandbox, change))


@router.get("", operation_id="list_sandboxes")
async def list_sandboxes(
    request: Request,
    caller: Caller,
    limit: PageLimit = 100,
    cursor: PageCursor = "",
    state: SandboxState | None = None,
    label: LabelFilter = None,
) -> SandboxPage:
    """List sandboxes, newest first, page by page."""
    labels = parse_label_filter(label)
    rows, next_cursor = services_of(request).sandboxes.list_page(limit, cursor, state, labels, caller.viewer_id)
    return SandboxPage(items=[render_sandbox(row) for row in rows], next_cursor=next_cursor)


@router.get("/{sandbox}", operation_id="get_sandbox")
async def get_sandbox(request: Request, sandbox: SandboxReference) -> Sandbox:
    """Show one sandbox."""
    return render_sandbox(services_of(request).sandboxes.get(sandbox))


@router.delete(
    "/{sandbox}",
    operation_id="destroy_sandbox",
    status_code=204,
    responses={202: {"model": None, "description": "It is being destroyed."}},
)
async def destroy_sandbox(
    request: Request,
    sandbox: SandboxReference,
    wait: bool = False,
    timeout_seconds: WaitSeconds = 120,
) -> Response:
    """Destroy a sandbox in whatever state it is: its processes, files and names. Answers 202, or with `wait=true` 204
    when nothing of it is left."""
    gone = await services_of(request).sandboxes.destroy(sandbox, timeout_seconds if wait else None)
    return Response(status_code=204 if gone else 202)


@router.get(
    "/{sandbox}/console",
    operation_id="get_console",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def get_console(
    request: Request, sandbox: SandboxReference, limit_bytes: Annotated[int, Query(ge=1, le=1048576)] = 65536
) -> Response:
    """The newest bytes of the sandbox's serial console, as the guest wrote them (terminal escapes included)."""
    data = await services_of(request).sandboxes.console(sandbox, limit_bytes)
    return Response(data, media_type="application/octet-stream")


@router.get("/{sandbox}/metrics", operation_id="get_metrics")
async def get_metrics(session: Annotated[GuestSession, Depends(looking_session_of)]) -> SandboxMetrics:
    """Processor, memory and disk of a running sandbox, as its guest sees them."""
    figures = await session.driver.metrics(session.sandbox_id)
    return SandboxMetrics(
        cpu_count=figures.cpu_count,
        cpu_used_percent=figures.cpu_used_percent,
        memory_total_bytes=figures.memory_total_bytes,
        memory_used_bytes=figures.memory_used_bytes,
        disk_total_bytes=figures.disk_total_bytes,
        disk_used_bytes=figures.disk_used_bytes,
        uptime_seconds=figures.uptime_seconds,
    )
