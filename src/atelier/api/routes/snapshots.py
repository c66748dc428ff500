"""Take, list, show and delete snapshots; fork a sandbox."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from atelier.api.authorisation import Caller
from atelier.api.idempotency import Once
from atelier.api.parameters import (
    LabelFilter,
    PageCursor,
    PageLimit,
    SandboxReference,
    SnapshotReference,
    WaitSeconds,
    parse_label_filter,
    services_of,
)
from atelier.api.rendering import render_sandbox, render_snapshot
from atelier.model.snapshot import SnapshotState
from atelier.model.states import SandboxState
from atelier.schemas.sandboxes import ForkRequest, SandboxList
from atelier.schemas.snapshots import Snapshot, SnapshotPage, TakeSnapshotRequest

router = APIRouter(tags=["snapshots"])

_UNDER_WAY = (SnapshotState.TAKING, SnapshotState.BAKING)
_TAKEN: dict[int | str, dict[str, Any]] = {201: {"model": Snapshot, "description": "It is ready, or failed."}}
_FORKED: dict[int | str, dict[str, Any]] = {201: {"model": SandboxList, "description": "They run, or failed."}}


@router.post("/sandboxes/{sandbox}/snapshots", operation_id="take_snapshot", status_code=202, responses=_TAKEN)
async def take_snapshot(
    request: Request,
    response: Response,
    once: Once,
    sandbox: SandboxReference,
    body: TakeSnapshotRequest | None = None,
    wait: bool = False,
    timeout_seconds: WaitSeconds = 120,
) -> Snapshot:
    """Take a snapshot of a running sandbox, memory and disk; the sandbox goes on. Answers 202 at once; with `wait=true`
    201 when it is `ready` or `failed`, or 202 when neither has come true within `timeout_seconds` (it goes on)."""
    service = services_of(request).snapshots
    wish = body or TakeSnapshotRequest(keep_last=None)

    async def take() -> list[str]:
        return [(await service.take(sandbox, wish.name, labels=wish.labels, keep_last=wish.keep_last)).id]

    (snapshot_id,) = await once(wish, take)
    row = service.get(snapshot_id)
    if wait:
        row = await service.wait_settled(row.id, timeout_seconds)
        if row.state not in _UNDER_WAY:
            response.status_code = 201
    return render_snapshot(row)


@router.post("/sandboxes/{sandbox}/fork", operation_id="fork_sandbox", status_code=202, responses=_FORKED)
async def fork_sandbox(
    request: Request,
    response: Response,
    caller: Caller,
    once: Once,
    sandbox: SandboxReference,
    body: ForkRequest | None = None,
    wait: bool = False,
    timeout_seconds: WaitSeconds = 120,
) -> SandboxList:
    """Make sandboxes that go on from where a running one is now, which goes on itself. It is saved once for all of them,
    then they are begun; answers 202 when they are, or with `wait=true` 201 when each is `running` or `failed`, or 202
    when that has not come true within `timeout_seconds`. Where the host has no room for all, nothing is done, and the
    error says how many would fit."""
    services, wish = services_of(request), body or ForkRequest(count=1)
    deadline = time.monotonic() + timeout_seconds

    async def fork() -> list[str]:
        forks = await services.snapshots.fork(
            sandbox,
            wish.count,
            owner_id=caller.user_id,
            name_prefix=wish.name_prefix,
            labels=wish.labels,
            timeout_seconds=timeout_seconds,
        )
        return [each.id for each in forks]

    rows = [services.sandboxes.get(each) for each in await once(wish, fork)]
    if wait:
        left = max(0.001, deadline - time.monotonic())
        rows = [
            row for row, _ in await asyncio.gather(*(services.sandboxes.wait_settled(row.id, left) for row in rows))
        ]
        if all(row.state is not SandboxState.CREATING for row in rows):
            response.status_code = 201
    return SandboxList(items=[render_sandbox(row) for row in rows])


@router.get("/snapshots", operation_id="list_snapshots")
async def list_snapshots(
    request: Request,
    caller: Caller,
    limit: PageLimit = 100,
    cursor: PageCursor = "",
    sandbox: Annotated[
        str | None, Query(description="only those of this sandbox, by id or name", max_length=64)
    ] = None,
    label: LabelFilter = None,
) -> SnapshotPage:
    """List snapshots that are `ready` or `damaged`, oldest first, page by page, those that forks are made from included."""
    rows, next_cursor = services_of(request).snapshots.list_page(
        limit, cursor, sandbox, parse_label_filter(label), caller.viewer_id
    )
    return SnapshotPage(items=[render_snapshot(row) for row in rows], next_cursor=next_cursor)


@router.get("/snapshots/{snapshot}", operation_id="get_snapshot")
async def get_snapshot(request: Request, snapshot: SnapshotReference) -> Snapshot:
    """Show one snapshot, in whatever state it is."""
    return render_snapshot(services_of(request).snapshots.get(snapshot))


@router.delete("/snapshots/{snapshot}", operation_id="delete_snapshot", status_code=204)
async def delete_snapshot(request: Request, snapshot: SnapshotReference) -> Response:
    """Delete a snapshot. Answers 204 when nothing of it is left; refused while a sandbox or another snapshot needs it."""
    await services_of(request).snapshots.delete(snapshot)
    return Response(status_code=204)
