"""With whom a sandbox is shared."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from atelier.api.parameters import SandboxReference, services_of
from atelier.model.principal import User
from atelier.schemas.accounts import Share, ShareList, ShareRequest

router = APIRouter(prefix="/sandboxes/{sandbox}/shares", tags=["sharing"])


@router.get("", operation_id="list_shares")
async def list_shares(request: Request, sandbox: SandboxReference) -> ShareList:
    """With whom a sandbox is shared."""
    return ShareList(items=[_share(each) for each in services_of(request).access.list_shares(sandbox)])


@router.post("", operation_id="share_sandbox")
async def share_sandbox(request: Request, sandbox: SandboxReference, body: ShareRequest) -> Share:
    """Share a sandbox: they may then do with it all that its owner may, but to destroy it, to share it, and to delete
    snapshots of it. Twice is once."""
    return _share(await services_of(request).access.share(sandbox, body.user))


@router.delete("/{user}", operation_id="unshare_sandbox", status_code=204)
async def unshare_sandbox(
    request: Request,
    sandbox: SandboxReference,
    user: Annotated[str, Path(description="id or e-mail address of the user", max_length=254)],
) -> Response:
    """Stop sharing a sandbox with somebody. What they have open stays open; their next request is refused."""
    await services_of(request).access.unshare(sandbox, user)
    return Response(status_code=204)


def _share(user: User) -> Share:
    return Share(user_id=user.id, name=user.name, email=user.email)
