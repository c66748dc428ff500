"""Create, list, show and destroy sandboxes; their console and figures."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from atelier.api.parameters import SandboxReference, services_of, session_of
from atelier.api.rendering import render_sandbox
from atelier.model.errors import InvalidRequestError
from atelier.model.sandbox import SandboxSpec
from atelier.model.states import SandboxState
from atelier.schemas.sandboxes import CreateSandboxRequest, Sandbox, SandboxMetrics, SandboxPage
from atelier.services.guest_sessions import GuestSession

router = APIRouter(prefix="/sandboxes", tags=["sandboxes"])

WaitSeconds = Annotated[float, Query(gt=0, le=3600, description="how long to wait at most")]


@router.post(
    "",
    operation_id="create_sandbox",
    status_code=202,
    responses={201: {"model": Sandbox, "description": "It is running, or failed."}},
)
async def create_sandbox(
    request: Request,
    response: Response,
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
    )
    row = await service.create(body.name, spec)
    if wait:
        row = await service.wait_settled(row.id, timeout_seconds)
        if row.state is not SandboxState.CREATING:
            response.status_code = 201
    return render_sandbox(row)


@router.get("", operation_id="list_sandboxes")
async def list_sandboxes(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    cursor: Annotated[str, Query(max_length=200, description="`next_cursor` of the page before")] = "",
    state: SandboxState | None = None,
    label: Annotated[list[str] | None, Query(description="`key=value`; several must all hold", max_length=16)] = None,
) -> SandboxPage:
    """List sandboxes, newest first, page by page."""
    labels: dict[str, str] = {}
    for pair in label or []:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InvalidRequestError(f"the label filter {pair!r} is not of the form key=value", hint="?label=team=web")
        labels[key] = value
    rows, next_cursor = services_of(request).sandboxes.list_page(limit, cursor, state, labels)
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
async def get_metrics(session: Annotated[GuestSession, Depends(session_of)]) -> SandboxMetrics:
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
