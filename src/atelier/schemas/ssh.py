"""Public keys for SSH, and where SSH is served: what is asked for and what is answered."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, Field

from atelier.model.ssh_key import MAX_LINE_LENGTH
from atelier.schemas.accounts import EmailText, ShownName
from atelier.schemas.request_body import RequestBody


class SshKey(BaseModel):
    """``fingerprint``: as ``ssh-keygen -l`` shows it. ``public_key``: the line without its comment."""

    id: str
    user_id: str
    name: str
    type: str
    fingerprint: str
    public_key: str
    created_at: datetime


class SshKeyList(BaseModel):
    items: list[SshKey]


class AddSshKeyRequest(RequestBody):
    """``public_key``: the content of a ``.pub`` file. ``name`` absent: its comment. ``user``: whose it is to be, by id or
    e-mail address, which admins may say; absent: one's own."""

    public_key: Annotated[str, Field(min_length=1, max_length=MAX_LINE_LENGTH)]
    name: ShownName | None = None
    user: EmailText | None = None


class SshAddress(BaseModel):
    """``host_key``: the line by which a client knows this server. ``port`` is 0 where SSH is not served; ``problem`` says
    why."""

    host: str
    port: int
    host_key: str
    problem: str
