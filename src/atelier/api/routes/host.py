"""The host as a whole: disks without a sandbox, and the manager's end."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from atelier.api.parameters import services_of
from atelier.schemas.host import OrphanVolume, OrphanVolumeList, ShutdownAnswer, ShutdownRequest

router = APIRouter(prefix="/host", tags=["host"])


@router.get("/orphan-volumes", operation_id="list_orphan_volumes")
async def list_orphan_volumes(request: Request) -> OrphanVolumeList:
    """Disks that belong to no sandbox, as after the restore of an older backup. They are kept until somebody removes
    them."""
    orphans = await services_of(request).host.list_orphan_volumes()
    return OrphanVolumeList(
        items=[OrphanVolume(sandbox_id=each.sandbox_id, used_bytes=each.used_bytes) for each in orphans]
    )


@router.delete("/orphan-volumes/{sandbox_id}", operation_id="remove_orphan_volume", status_code=204)
async def remove_orphan_volume(request: Request, sandbox_id: Annotated[str, Path(max_length=64)]) -> Response:
    """Remove a disk that belongs to no sandbox, for good."""
    await services_of(request).host.remove_orphan_volume(sandbox_id)
    return Response(status_code=204)


@router.post("/shutdown", operation_id="shut_down")
async def shut_down(request: Request, body: ShutdownRequest) -> ShutdownAnswer:
    """End the manager, in order. Answers when the sandboxes are stopped (or destroyed, or left to run)."""
    changed, running = await services_of(request).host.shut_down(body.sandboxes)
    return ShutdownAnswer(changed=changed, running=running)
