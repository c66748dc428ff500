"""Asks the manager who may visit which preview. Called by ``preview_exchange``, before a byte of a request goes on.

Who may is remembered for a moment, so that a page of a hundred files is one question; and while the manager does not
answer, as when it is restarted, for a minute. A refusal is never remembered.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

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
_USED_SECONDS: Final = 20.0
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

_Key = tuple[str, str, str, str, bool]
MANAGER_AWAY: Final = PreviewPage(
    503, "manager_away", "Atelier is being restarted", "This page comes again by itself.", again_seconds=3
)


class PreviewDoor:
    """``path``: the manager's socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[_Key, tuple[float, Admitted]] = {}
        self._used: set[str] = set()
        self._telling: asyncio.Task[None] | None = None

    async def find(self, visit: Visit) -> Admitted | Answered:
        key = _key(visit)
        at, known = self._known.get(key, (0.0, None))
        now = time.monotonic()
        is_own = visit.target.startswith(OWN_PATHS)
        if known is not None and not is_own and now - at < _FRESH_SECONDS:
            return known
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                answer = cast("dict[str, Any]", await ask(self._path, {"operation": "preview_visit", **asdict(visit)}))
            if not answer["ok"]:
                raise ValueError(answer.get("message"))
            if "sandbox_id" not in answer:
                self._known.pop(key, None)
                headers = [(str(name), str(value)) for name, value in answer["headers"]]
                return Answered(answer["status"], headers, base64.b64decode(answer["body"]))
        except (OSError, TimeoutError, ValueError, KeyError, asyncio.LimitOverrunError) as error:
            if known is not None and not is_own and now - at < _KEPT_SECONDS:
                return known
            log.warning("the manager was not asked who may visit %s: %s", visit.host, error)
            return answer_page(MANAGER_AWAY, visit.accept)
        admitted = Admitted(str(answer["sandbox_id"]), int(answer["port"]))
        if len(self._known) >= _KEPT_MAX:
            self._known.clear()
        self._known[key] = (now, admitted)
        return admitted

    def forget(self, visit: Visit) -> bool:
        """The sandbox does not answer, so what is known of it may be old. Whether there was anything."""
        return self._known.pop(_key(visit), None) is not None

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


def _key(visit: Visit) -> _Key:
    is_unsafe = visit.is_upgrade or visit.method not in _SAFE_METHODS
    return visit.host, visit.cookies, visit.key, visit.origin, is_unsafe
