"""The manager's part of previews: has the gateway serve them, and tells it who may visit.

Opened by ``installation`` where there is a gateway. A port that is taken, by a second installation as a rule, keeps nobody
from anything else: it is said once, and tried again.
"""

from __future__ import annotations

import base64
import logging
from typing import cast

from atelier.config.previews import PreviewSettings
from atelier.host.line_server import Answer, Request, ask
from atelier.manager.gateway_questions import text_of
from atelier.model.errors import InvalidRequestError
from atelier.model.ids import is_sandbox_id
from atelier.model.layout import RunLayout
from atelier.model.preview import LOCAL_DOMAIN, PreviewSite
from atelier.model.preview_visit import Answered, Visit
from atelier.services.preview_entry import PreviewEntry
from atelier.services.previews import PreviewService

logger = logging.getLogger(__name__)

_TEXTS = ("host", "method", "target", "cookies", "origin", "key", "accept", "address")
_TEXT_MAX_LENGTH = 33_000


class PreviewServing:
    def __init__(
        self, previews: PreviewService, entry: PreviewEntry, run: RunLayout, settings: PreviewSettings
    ) -> None:
        self._previews = previews
        self._entry = entry
        self._run = run
        self._settings = settings

    async def keep(self) -> None:
        """Have the gateway serve, a new one too. The body of a background loop."""
        settings, listen = self._settings, self._settings.listen
        has_socket = listen is None and not settings.is_off
        request: Request = {
            "operation": "serve_previews",
            "host": listen.host if listen else "",
            "port": listen.port if listen else 0,
            "socket_path": str(settings.socket or self._run.previews_socket) if has_socket else "",
        }
        try:
            answer = await ask(self._run.gateway_socket, request)
        except (OSError, ValueError) as error:
            answer: Answer = {"ok": False, "message": f"the gateway does not answer: {error}"}
        problem = "" if answer.get("ok") else str(answer.get("message"))
        if self._settings.is_off:
            problem = "they are turned off: ATELIER_PREVIEWS_LISTEN is off"
        port = answer.get("port")
        self._tell(problem, port if isinstance(port, int) else 0)

    def _tell(self, problem: str, port: int) -> None:
        settings = self._settings
        # By a proxy, they are where that listens.
        own_port = port if settings.domain == LOCAL_DOMAIN else settings.port
        found = PreviewSite(settings.scheme, settings.domain, own_port, problem)
        if found != self._previews.site and not settings.is_off:
            if problem:
                logger.warning(
                    "previews are not served: %s; it is tried again, ATELIER_PREVIEWS_LISTEN=ADDRESS:PORT chooses"
                    " another one, and ATELIER_PREVIEWS_LISTEN=off turns them off",
                    problem,
                )
            else:
                logger.info("previews are served at %s", found.url("SANDBOX", 8000))
        self._previews.site = found

    async def answer(self, request: Request) -> Answer:
        """Of the gateway's questions those that begin with ``preview_``."""
        match request.get("operation"):
            case "preview_visit":
                texts = {name: text_of(request, name, _TEXT_MAX_LENGTH) for name in _TEXTS}
                decided = await self._entry.decide(Visit(**texts, is_upgrade=request.get("is_upgrade") is True))
                if isinstance(decided, Answered):
                    body = base64.b64encode(decided.body).decode()
                    return {"ok": True, "status": decided.status, "headers": decided.headers, "body": body}
                return {"ok": True, "sandbox_id": decided.sandbox_id, "port": decided.port}
            case "preview_used":
                used = request.get("sandbox_ids")
                for each in cast("list[object]", used) if isinstance(used, list) else []:
                    if isinstance(each, str) and is_sandbox_id(each):
                        self._entry.note_use(each)
                return {"ok": True}
            case _:
                raise InvalidRequestError("unknown operation: the manager knows preview_visit and preview_used")
