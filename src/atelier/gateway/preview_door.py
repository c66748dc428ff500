"""Asks the manager who may visit which preview. Called by ``preview_exchange``, before a byte of a request goes on.

Who may is remembered for a moment, so that a page of a hundred files is one question; and while the manager does not
answer, as when it is restarted, for a minute. Who is not known then waits for it. A refusal is never remembered.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

from atelier.gateway.preview_headers import AdmissionKey, PreviewRequest
from atelier.host.line_server import ask
from atelier.model.preview import OWN_PATHS
from atelier.model.preview_page import PreviewPage
from atelier.model.preview_visit import Admitted, Answered, Visit

log = logging.getLogger(__name__)

_FRESH_SECONDS: Final = 2.0
_KEPT_SECONDS: Final = 60.0
_KEPT_MAX: Final = 4096
_ANSWER_SECONDS: Final = 90.0
"""A little longer than the manager waits for a paused sandbox."""
_AWAY_PAUSE_SECONDS: Final = (0.05, 1.0)
_USED_SECONDS: Final = 20.0
_OWN_PATHS: Final = OWN_PATHS.encode()

_MANAGER_AWAY: Final = PreviewPage(
    503, "manager_away", "Atelier is being restarted", "This page comes again by itself.", again_seconds=3
)


class PreviewDoor:
    """``path``: the manager's socket. ``away_seconds``: how long somebody waits for a manager that is not there."""

    def __init__(self, path: Path, *, away_seconds: float = 20.0) -> None:
        self._path = path
        self._away_seconds = away_seconds
        self._known: dict[AdmissionKey, tuple[float, Admitted]] = {}
        self._used: set[str] = set()
        self._telling: asyncio.Task[None] | None = None

    def find_known(self, request: PreviewRequest, within_seconds: float = _FRESH_SECONDS) -> Admitted | None:
        """Who was let in so lately is not asked about again."""
        known = self._known.get(request.key)
        if known is None or time.monotonic() - known[0] >= within_seconds or request.target.startswith(_OWN_PATHS):
            return None
        return known[1]

    async def ask(self, request: PreviewRequest) -> Admitted | Answered:
        """What the manager says. While it is not there, who was let in within the last minute still is; anybody else waits,
        and is told in the end."""
        key, visit = request.key, request.describe()
        waits_until = time.monotonic() + self._away_seconds
        pause, most = _AWAY_PAUSE_SECONDS
        while True:
            try:
                found = await self._ask(visit)
            except (OSError, ValueError, KeyError, asyncio.LimitOverrunError) as error:
                if (known := self.find_known(request, _KEPT_SECONDS)) is not None:
                    return known
                if isinstance(error, OSError) and time.monotonic() + pause < waits_until:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, most)
                    continue
                log.warning("the manager was not asked who may visit %s: %s", visit.host, error)
                return answer_page(_MANAGER_AWAY, visit.accept)
            if isinstance(found, Answered):
                self._known.pop(key, None)
            else:
                if len(self._known) >= _KEPT_MAX:
                    self._known.clear()
                self._known[key] = (time.monotonic(), found)
            return found

    async def _ask(self, visit: Visit) -> Admitted | Answered:
        """Raises OSError where nobody answers, and for nonsense ValueError, KeyError, LimitOverrunError."""
        async with asyncio.timeout(_ANSWER_SECONDS):
            answer = cast("dict[str, Any]", await ask(self._path, {"operation": "preview_visit", **asdict(visit)}))
        if not answer["ok"]:
            raise ValueError(answer.get("message"))
        if "sandbox_id" in answer:
            return Admitted(str(answer["sandbox_id"]), int(answer["port"]))
        headers = [(str(name), str(value)) for name, value in answer["headers"]]
        return Answered(answer["status"], headers, base64.b64decode(answer["body"]))

    def forget(self, request: PreviewRequest) -> bool:
        """The sandbox does not answer, so what is known of it may be old. Whether there was anything."""
        return self._known.pop(request.key, None) is not None

    def note_use(self, sandbox_id: str) -> None:
        """Tell the manager soon."""
        self._used.add(sandbox_id)
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        await asyncio.sleep(_USED_SECONDS)
        self._telling = None
        used, self._used = self._used, set()
        try:
            await ask(self._path, {"operation": "preview_used", "sandbox_ids": sorted(used)[:1000]})
        except (OSError, ValueError) as error:
            log.debug("the manager was not told which sandboxes are used: %s", error)

    def close(self) -> None:
        if self._telling is not None:
            self._telling.cancel()


def answer_page(page: PreviewPage, accept: str) -> Answered:
    headers, body = page.render(accept)
    return Answered(page.status, headers, body)
