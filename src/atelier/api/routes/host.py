"""The host as a whole: what belongs to nobody, and the manager's end."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from atelier.api.parameters import services_of
from atelier.model.orphan import OrphanKind
from atelier.schemas.host import Orphan, OrphanList, ShutdownAnswer, ShutdownRequest

router = APIRouter(prefix="/host", tags=["host"])


@router.get("/orphans", operation_id="list_orphans")
async def list_orphans(request: Request) -> OrphanList:
    """Disks, memories of paused sandboxes and snapshots that belong to nobody, as after the restore of an older backup.
    They are kept until somebody removes them."""
    orphans = await services_of(request).host.list_orphans()
    return OrphanList(items=[Orphan(kind=each.kind, id=each.id, used_bytes=each.used_bytes) for each in orphans])


@router.delete("/orphans/{kind}/{orphan}", operation_id="remove_orphan", status_code=204)
async def remove_orphan(request: Request, kind: OrphanKind, orphan: Annotated[str, Path(max_length=64)]) -> Response:
    """Remove what belongs to nobody, for good."""
    await services_of(request).host.remove_orphan(kind, orphan)
    return Response(status_code=204)


@router.post("/shutdown", operation_id="shut_down")
async def shut_down(request: Request, body: ShutdownRequest) -> ShutdownAnswer:
    """End the manager, in order. Answers when the sandboxes are stopped (or destroyed, or left to run)."""
    changed, running = await services_of(request).host.shut_down(body.sandboxes)
    return ShutdownAnswer(changed=changed, running=running)
