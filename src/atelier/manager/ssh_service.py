"""The manager's part of SSH: has the gateway serve it, and tells it who may enter.

Opened by ``installation`` where there is a gateway. A port that is taken, by a second installation as a rule, keeps nobody
from anything else: it is said once, and tried again.
"""

from __future__ import annotations

import logging

from atelier.config.addresses import ListenAddress
from atelier.host.files import write_atomically
from atelier.host.line_server import Answer, Request, ask
from atelier.lifecycle.ssh_host_key import make_ssh_host_key
from atelier.manager.gateway_questions import text_of
from atelier.model.errors import AccessDeniedError, InvalidRequestError
from atelier.model.layout import DataLayout, RunLayout
from atelier.model.ssh_key import MAX_LINE_LENGTH, SshAddress
from atelier.services.ssh_keys import SshEntry, SshKeyService

logger = logging.getLogger(__name__)


class SshService:
    """``listen`` None: SSH is turned off."""

    def __init__(
        self, keys: SshKeyService, entry: SshEntry, data: DataLayout, run: RunLayout, listen: ListenAddress | None
    ) -> None:
        self._keys = keys
        self._entry = entry
        self._data = data
        self._run = run
        self._listen = listen
        self._public_key = ""

    def open(self) -> None:
        """Raises HostError, OSError."""
        self._public_key = self._ensure_host_key()

    async def keep(self) -> None:
        """Have the gateway serve, a new one too. The body of a background loop."""
        listen, key = self._listen, self._data.ssh_host_key
        request: Request = {
            "operation": "serve_ssh",
            "host": listen.host if listen else "",
            "port": listen.port if listen else 0,
            "host_key_path": str(key),
        }
        try:
            answer = await ask(self._run.gateway_socket, request)
        except (OSError, ValueError) as error:
            answer: Answer = {"ok": False, "message": f"the gateway does not answer: {error}"}
        problem = "" if answer.get("ok") else str(answer.get("message"))
        port = answer.get("port")
        if listen is None:
            found = SshAddress("", 0, "", "SSH is turned off: ATELIER_SSH_LISTEN is off")
        elif problem or not isinstance(port, int):
            found = SshAddress(listen.host, 0, self._public_key, problem)
        else:
            found = SshAddress(listen.host, port, self._public_key)
        if found != self._keys.address and listen is not None:
            if found.problem:
                logger.warning(
                    "there is no SSH: %s; it is tried again, ATELIER_SSH_LISTEN=ADDRESS:PORT chooses another one, and"
                    " ATELIER_SSH_LISTEN=off turns it off",
                    found.problem,
                )
            else:
                logger.info("SSH is served at %s, port %d", found.host, found.port)
        self._keys.address = found

    def _ensure_host_key(self) -> str:
        """The public key's line. Made once: people's machines remember it."""
        path = self._data.ssh_host_key
        public_path = path.with_name(f"{path.name}.pub")
        if not path.exists() or not public_path.exists():
            made = make_ssh_host_key()
            write_atomically(public_path, f"{made.public_key}\n".encode())
            write_atomically(path, made.private_key.encode())
        return public_path.read_text().strip()

    async def answer(self, request: Request) -> Answer:
        """Of the gateway's questions those that begin with ``ssh_``."""
        match request.get("operation"):
            case "ssh_find":
                entry = self._keys.find_entry(_text(request, "sandbox"), _text(request, "key"))
                return {"ok": True, "sandbox_id": entry.sandbox_id, "user": entry.principal.user_id}
            case "ssh_known":
                if not self._keys.find_holders(_text(request, "key")):
                    raise AccessDeniedError("nobody comes by this key", code="ssh_refused")
                return {"ok": True}
            case "ssh_enter":
                await self._entry.enter(_text(request, "sandbox_id"), _text(request, "key"), _text(request, "address"))
                return {"ok": True}
            case "ssh_used":
                self._entry.note_use(_text(request, "sandbox_id"))
                return {"ok": True}
            case _:
                raise InvalidRequestError(
                    "unknown operation: the manager knows ssh_find, ssh_known, ssh_enter and ssh_used"
                )


def _text(request: Request, name: str) -> str:
    return text_of(request, name, MAX_LINE_LENGTH)
