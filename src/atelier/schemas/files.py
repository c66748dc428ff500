"""Files in a sandbox. Paths in queries are percent-encoded bytes, so that any file name can be said."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel

from atelier.model.guest import EntryType
from atelier.schemas.request_body import RequestBody


class FileEntry(BaseModel):
    """``path_base64`` holds the exact bytes of a path that is no UTF-8, else it is absent; ``mode`` is a number
    (permission bits)."""

    name: str
    path: str
    path_base64: str | None = None
    type: EntryType
    size_bytes: int
    mode: int
    owner: str
    group: str
    modified_at: datetime
    symlink_target: str | None = None


class FileList(BaseModel):
    items: list[FileEntry]


class MoveRequest(RequestBody):
    source: str
    destination: str
    user: str = ""
