"""Warm pools: show them, say how many sandboxes are to stand ready, drain."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request

from atelier.api.parameters import services_of
from atelier.api.rendering import render_warm_pool
from atelier.model import warm_pool as model
from atelier.schemas.warm_pools import SetWarmPoolRequest, WarmPool, WarmPoolList

router = APIRouter(prefix="/warm-pools", tags=["warm pools"])

ImageName = Annotated[str, Path(description="name of the image", max_length=100)]


@router.get("", operation_id="list_warm_pools")
async def list_warm_pools(request: Request) -> WarmPoolList:
    """List the warm pools, and how many of each are ready."""
    return WarmPoolList(items=[render_warm_pool(each) for each in services_of(request).warm_pools.list_pools()])


@router.put("/{image}", operation_id="set_warm_pool")
async def set_warm_pool(request: Request, image: ImageName, body: SetWarmPoolRequest) -> WarmPool:
    """Have `size` sandboxes of an image stand ready. A create that asks for this image, these sizes, a disk of the usual
    size and no network policy of its own takes one of them. Answers when those that are short are begun, and those that
    are too many are gone."""
    pool = model.WarmPool(image, body.vcpu_count, body.memory_mib, body.size)
    return render_warm_pool(await services_of(request).warm_pools.set_size(pool))


@router.delete("/{image}", operation_id="drain_warm_pool", status_code=204)
async def drain_warm_pool(request: Request, image: ImageName) -> None:
    """Give up all warm pools of an image; answers when none of their sandboxes is left. What was taken stays."""
    await services_of(request).warm_pools.drain(image)
