"""Images: what is built, what can be built, and builds with progress."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import StreamingResponse

from atelier.api.parameters import services_of
from atelier.api.rendering import render_image
from atelier.api.streams import NDJSON, begun, ndjson
from atelier.model.image import BuildProgress
from atelier.schemas.images import BuildDoneEvent, BuildEvent, BuildImageRequest, BuildProgressEvent, ImageList

router = APIRouter(prefix="/images", tags=["images"])


@router.get("", operation_id="list_images")
async def list_images(request: Request) -> ImageList:
    """Images that are built, and the names that can be."""
    images = services_of(request).images
    return ImageList(
        items=[render_image(image) for image in await images.list_images()], recipes=await images.list_recipes()
    )


@router.post(
    "/{name}/build",
    operation_id="build_image",
    response_class=StreamingResponse,
    responses={200: {"model": BuildEvent, "content": {NDJSON: {}}, "description": "One event per line."}},
)
async def build_image(
    request: Request, name: Annotated[str, Path(max_length=100)], body: BuildImageRequest
) -> StreamingResponse:
    """Build an image (and the kernel and tools that every sandbox boots with) unless it is cached; streams `progress`
    events, then `built` or `failed`. A client that goes away does not stop the build."""

    async def events() -> AsyncGenerator[BuildProgressEvent | BuildDoneEvent]:
        async for step in services_of(request).images.build(name, refresh=body.refresh):
            if isinstance(step, BuildProgress):
                yield BuildProgressEvent(phase=step.phase, message=step.message, fraction=step.fraction)
            else:
                yield BuildDoneEvent(image=render_image(step))

    return ndjson(await begun(events()))
