"""Files in a sandbox: whole or in ranges, folders as tar streams."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse

from atelier.api.parameters import GuestUser, guest_path, session_of
from atelier.api.rendering import render_entry
from atelier.model.errors import InvalidRequestError
from atelier.schemas.files import FileEntry, FileList, MoveRequest
from atelier.services.guest_sessions import GuestSession, check_path

router = APIRouter(prefix="/sandboxes/{sandbox}/files", tags=["files"])

Session = Annotated[GuestSession, Depends(session_of)]
GuestPath = Annotated[bytes, Depends(guest_path)]
_OCTETS = "application/octet-stream"
_RANGE = re.compile("bytes=([0-9]{0,18})-([0-9]{0,18})")
"""What is of another form is passed over, as HTTP has it; so is what no file could have."""
_RAW_BODY = {
    "requestBody": {"required": True, "content": {_OCTETS: {"schema": {"type": "string", "format": "binary"}}}}
}


@router.get(
    "",
    operation_id="read_file",
    response_class=StreamingResponse,
    responses={200: {"content": {_OCTETS: {}}}, 206: {"description": "The range that was asked for."}},
)
async def read_file(request: Request, session: Session, path: GuestPath, user: GuestUser = "") -> StreamingResponse:
    """Read a file, or one range of it (`Range: bytes=…`)."""
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    offset, length = 0, None
    if asked and asked[1]:
        offset = int(asked[1])
        length = max(0, int(asked[2]) - offset + 1) if asked[2] else None
    elif asked and asked[2]:
        size = (await session.driver.stat(session.sandbox_id, path, user)).size_bytes
        offset = max(0, size - int(asked[2]))
    stack = AsyncExitStack()
    total, chunks = await stack.enter_async_context(
        session.driver.read_file(session.sandbox_id, path, user, offset=offset, length=length)
    )
    try:
        if asked and offset >= total:
            raise InvalidRequestError(
                f"the range begins at {offset}, the file has {total} bytes", code="range_not_satisfiable"
            )
    except InvalidRequestError:
        await stack.aclose()
        raise
    count = total - offset if length is None else min(length, total - offset)
    headers = {"Accept-Ranges": "bytes", "Content-Length": str(count)}
    if asked:
        headers["Content-Range"] = f"bytes {offset}-{offset + count - 1}/{total}"
    return StreamingResponse(
        _closing(session, stack, chunks), status_code=206 if asked else 200, media_type=_OCTETS, headers=headers
    )


@router.put("", operation_id="write_file", openapi_extra=_RAW_BODY)
async def write_file(request: Request, session: Session, path: GuestPath, user: GuestUser = "") -> FileEntry:
    """Write a file: the body is its whole content. Readers see the old file or the new one, and a transfer that
    breaks off leaves the old one."""
    with session.in_use():
        return render_entry(await session.driver.write_file(session.sandbox_id, path, request.stream(), user))


@router.delete("", operation_id="remove_file", status_code=204)
async def remove_file(session: Session, path: GuestPath, user: GuestUser = "") -> Response:
    """Remove a file, or a folder with all that is in it."""
    await session.driver.remove(session.sandbox_id, path, user)
    return Response(status_code=204)


@router.get("/stat", operation_id="stat_file")
async def stat_file(session: Session, path: GuestPath, user: GuestUser = "") -> FileEntry:
    """Show one file or folder."""
    return render_entry(await session.driver.stat(session.sandbox_id, path, user))


@router.get("/list", operation_id="list_files")
async def list_files(
    session: Session, path: GuestPath, user: GuestUser = "", depth: Annotated[int, Query(ge=1, le=64)] = 1
) -> FileList:
    """List a folder, `depth` levels deep."""
    entries = await session.driver.list_directory(session.sandbox_id, path, user, depth)
    return FileList(items=[render_entry(entry) for entry in entries])


@router.post("/directory", operation_id="make_directory", status_code=201)
async def make_directory(session: Session, path: GuestPath, user: GuestUser = "") -> FileEntry:
    """Make a folder and the folders above it."""
    return render_entry(await session.driver.make_directory(session.sandbox_id, path, user))


@router.post("/move", operation_id="move_file")
async def move_file(session: Session, body: MoveRequest) -> FileEntry:
    """Move or rename a file or folder."""
    source, destination = check_path(os.fsencode(body.source)), check_path(os.fsencode(body.destination))
    return render_entry(await session.driver.move(session.sandbox_id, source, destination, body.user))


@router.get(
    "/archive",
    operation_id="read_archive",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-tar": {}}}},
)
async def read_archive(session: Session, path: GuestPath, user: GuestUser = "") -> StreamingResponse:
    """A folder's content as a tar stream, names relative to the folder."""
    stack = AsyncExitStack()
    chunks = await stack.enter_async_context(session.driver.read_archive(session.sandbox_id, path, user))
    return StreamingResponse(_closing(session, stack, chunks), media_type="application/x-tar")


@router.put("/archive", operation_id="write_archive", status_code=204, openapi_extra=_RAW_BODY)
async def write_archive(request: Request, session: Session, path: GuestPath, user: GuestUser = "") -> Response:
    """Unpack a tar stream into a folder, which is made if it is absent."""
    with session.in_use():
        await session.driver.write_archive(session.sandbox_id, path, request.stream(), user)
    return Response(status_code=204)


async def _closing(session: GuestSession, stack: AsyncExitStack, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    with session.in_use():
        async with stack:
            async for chunk in chunks:
                yield chunk
