"""One's public keys for SSH, for admins everybody's; and where SSH is served."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from atelier.api.authorisation import Caller
from atelier.api.parameters import services_of
from atelier.model import ssh_key as model
from atelier.schemas.ssh import AddSshKeyRequest, SshAddress, SshKey, SshKeyList

router = APIRouter(tags=["ssh"])


@router.get("/ssh", operation_id="get_ssh")
async def get_ssh(request: Request) -> SshAddress:
    """Where SSH is served, and the key by which clients know it."""
    return SshAddress(**asdict(services_of(request).ssh_keys.address))


@router.get("/ssh-keys", operation_id="list_ssh_keys")
async def list_ssh_keys(
    request: Request,
    caller: Caller,
    everybodys: Annotated[bool, Query(alias="all", description="everybody's, for admins")] = False,
) -> SshKeyList:
    """List one's own keys, oldest first."""
    found = services_of(request).ssh_keys.list_keys(caller, everybodys=everybodys)
    return SshKeyList(items=[_key(each) for each in found])


@router.post("/ssh-keys", operation_id="add_ssh_key", status_code=201)
async def add_ssh_key(request: Request, caller: Caller, body: AddSshKeyRequest) -> SshKey:
    """Register a public key: whoever holds its private half may enter, over SSH, what its user may."""
    key = await services_of(request).ssh_keys.add_key(caller, body.public_key, body.name or "", user=body.user)
    request.state.subject = key.id
    return _key(key)


@router.delete("/ssh-keys/{key}", operation_id="delete_ssh_key", status_code=204)
async def delete_ssh_key(request: Request, caller: Caller, key: Annotated[str, Path(max_length=64)]) -> Response:
    """Forget a key, by its id. What it has opened stays open; it opens nothing more."""
    await services_of(request).ssh_keys.delete_key(caller, key)
    return Response(status_code=204)


def _key(row: model.SshKey) -> SshKey:
    return SshKey(
        id=row.id,
        user_id=row.user_id,
        name=row.name,
        type=row.key.type,
        fingerprint=row.key.fingerprint,
        public_key=row.key.line,
        created_at=row.created_at,
    )
