"""What a fake machine leaves when it is saved: small real files, so that they can be lost, damaged, copied and checked.

Called by the fake VMM. A stream, and the state of an image, is JSON with a hash over its content; an image's memory file
is the guest's memory as it is, and the state bears its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from atelier.host.files import write_atomically
from atelier.model.errors import HostError, VmmError
from atelier.model.machine import MemoryImage, MemoryStream


class GuestMemory(Protocol):
    """What the fake guests remember: files and processes travel with their machine."""

    def dump(self, sandbox_id: str, /) -> bytes:
        """Everything that the guest of this sandbox would find again."""
        ...

    def load(self, sandbox_id: str, data: bytes, /) -> None:
        """Let this sandbox's guest be what was dumped."""
        ...


@dataclass(frozen=True, slots=True)
class SavedGuest:
    """``nonce`` names the moment of saving: all that is restored from it shares it."""

    nonce: str
    memory_mib: int
    memory: bytes


def write_stream(saved: SavedGuest, target: Path) -> int:
    """Size in bytes of the file. Raises DiskFullError, HostError."""
    content = _sealed({**_head(saved), "memory": base64.b64encode(saved.memory).decode()})
    _write(target, content, 0o600)
    return len(content)


def write_image(saved: SavedGuest, image: MemoryImage) -> None:
    _write(image.memory, saved.memory, 0o400)
    _write(image.state, _sealed({**_head(saved), "memory_hash": _hash(saved.memory)}), 0o400)


def read_saved(source: MemoryStream | MemoryImage) -> SavedGuest:
    """Raises VmmError (``restore_failed``) for what is missing or damaged."""
    try:
        if isinstance(source, MemoryStream):
            content = _opened(source.path.read_bytes())
            memory = base64.b64decode(content["memory"], validate=True)
        else:
            content = _opened(source.state.read_bytes())
            memory = source.memory.read_bytes()
            if content["memory_hash"] != _hash(memory):
                raise ValueError("the memory is damaged")
        return SavedGuest(str(content["nonce"]), int(content["memory_mib"]), memory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VmmError(
            f"the saved machine cannot be loaded: {error}",
            code="restore_failed",
            hint="what was saved is damaged; start the sandbox from its disk",
        ) from error


def _head(saved: SavedGuest) -> dict[str, Any]:
    return {"nonce": saved.nonce, "memory_mib": saved.memory_mib}


def _sealed(content: dict[str, Any]) -> bytes:
    body = json.dumps(content)
    return json.dumps({"body": body, "hash": _hash(body.encode())}).encode()


def _opened(text: bytes) -> dict[str, Any]:
    outer = json.loads(text)
    if _hash(outer["body"].encode()) != outer["hash"]:
        raise ValueError("it is damaged")
    return json.loads(outer["body"])


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes, mode: int) -> None:
    if not os.access(path.parent, os.F_OK):
        raise HostError(f"{path} cannot be made: there is no such folder", code="folder_missing")
    write_atomically(path, content, mode=mode)
