"""Which sandboxes are attached, kept in small files so that a gateway that starts anew needs no manager.

Used by ``control`` alone. One JSON file per sandbox, mode 0600 (it holds the sandbox's token), in the gateway's own
folder of the run directory, beside the sandbox's socket; gone with a reboot, as the VMMs are.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from atelier.guest_protocol.frames import TOKEN_MAX_BYTES
from atelier.host.files import write_atomically
from atelier.model.errors import InvalidRequestError
from atelier.model.ids import is_sandbox_id

log = logging.getLogger(__name__)

LOCK_NAME = "gateway.lock"
"""Held by the gateway that the folder belongs to."""
_SUFFIX = ".json"


EndpointKind = Literal["virtio_serial", "vsock"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """``socket_path`` is the VMM's end of the guest channel, absolute. ``kind``: as ``GuestEndpoint.kind`` says."""

    sandbox_id: str
    socket_path: str
    token: str
    kind: EndpointKind = "virtio_serial"


def parse_attachment(value: object) -> Attachment:
    """Raises InvalidRequestError for anything but an object with these fields; without ``kind`` it is the first one."""
    if not isinstance(value, dict):
        raise InvalidRequestError("an attachment is a JSON object")
    fields = cast(dict[str, object], value)
    sandbox_id, socket_path, token = (fields.get(name) for name in ("sandbox_id", "socket_path", "token"))
    if not isinstance(sandbox_id, str) or not is_sandbox_id(sandbox_id):
        raise InvalidRequestError("sandbox_id is missing, or is no sandbox id")
    if not isinstance(socket_path, str) or not Path(socket_path).is_absolute() or "\0" in socket_path:
        raise InvalidRequestError("socket_path is missing, or is no absolute path")
    if not isinstance(token, str) or len(token.encode(errors="replace")) > TOKEN_MAX_BYTES:
        raise InvalidRequestError(f"token is missing, or has more than {TOKEN_MAX_BYTES} bytes")
    kind = fields.get("kind", "virtio_serial")
    if kind not in get_args(EndpointKind):
        raise InvalidRequestError(f"kind is none of {', '.join(get_args(EndpointKind))}")
    return Attachment(sandbox_id, socket_path, token, cast(EndpointKind, kind))


class AttachmentFiles:
    """The files in ``folder``, which exists and is private."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, attachment: Attachment) -> None:
        """Raises DiskFullError."""
        content = json.dumps(asdict(attachment)).encode()
        # Without waiting for the disk, as all guests' bytes would: of use for this boot only.
        write_atomically(self._file(attachment.sandbox_id), content, durable=False)

    def remove(self, sandbox_id: str) -> None:
        self._file(sandbox_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove all that is no attachment: sockets, and what was half made when a gateway was killed."""
        for file in self._folder.iterdir():
            if file.name != LOCK_NAME and (file.name.startswith(".") or file.suffix != _SUFFIX):
                file.unlink(missing_ok=True)

    def load(self) -> list[Attachment]:
        """All of them. A damaged file is named in the log and removed: the manager attaches again."""
        found: list[Attachment] = []
        for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                found.append(parse_attachment(json.loads(file.read_bytes())))
            except OSError as error:
                log.warning("the attachment %s cannot be read: %s", file.name, error)
            except (ValueError, RecursionError, InvalidRequestError) as error:
                log.warning("the attachment %s is damaged: %s", file.name, error)
                file.unlink(missing_ok=True)
        return found

    def _file(self, sandbox_id: str) -> Path:
        return self._folder / f"{sandbox_id}{_SUFFIX}"
