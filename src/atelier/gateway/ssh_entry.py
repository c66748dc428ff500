"""Asks the manager who may enter what over SSH. Called by ``ssh_connection``, before anybody is let in.

The manager is always asked. Only while it does not answer, as when it is restarted, what it has said within the last
half minute counts; a refusal is never remembered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Final

from atelier.host.line_server import Answer, Request, ask
from atelier.model.errors import AccessDeniedError, AtelierError, PreconditionError, TransientError

log = logging.getLogger(__name__)

_KEPT_SECONDS: Final = 30.0
_ANSWER_SECONDS: Final = 10.0
_WAKE_SECONDS: Final = 330.0
"""A little longer than the manager itself waits."""
_KEPT_MAX: Final = 4096


class ManagerDoor:
    """``path``: the manager's socket. ``key`` is always a public key's base64."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[tuple[str, str], tuple[float, str]] = {}

    async def find(self, reference: str, key: str) -> str:
        """The id of the sandbox that the key's holder may enter. Raises AccessDeniedError (``ssh_refused``),
        TransientError (``manager_away``)."""
        return await self._ask_or_remember("ssh_find", reference, key)

    async def is_known(self, key: str) -> bool:
        """Whether somebody comes by this key. Raises TransientError (``manager_away``)."""
        try:
            await self._ask_or_remember("ssh_known", "", key)
        except AccessDeniedError:
            return False
        return True

    async def enter(self, sandbox_id: str, key: str, address: str) -> None:
        """Return once the sandbox runs. A manager that is away is no hindrance: whether it runs, the channel will tell.
        Raises AtelierError with what the manager said."""
        request: Request = {"operation": "ssh_enter", "sandbox_id": sandbox_id, "key": key, "address": address}
        try:
            answer = await self._ask(request, _WAKE_SECONDS)
        except TransientError:
            return
        if not answer.get("ok"):
            raise _error_of(answer)

    async def note_use(self, sandbox_id: str) -> None:
        """Best effort."""
        try:
            await self._ask({"operation": "ssh_used", "sandbox_id": sandbox_id}, _ANSWER_SECONDS)
        except TransientError:
            log.debug("the manager was not told that %s is used", sandbox_id)

    async def _ask_or_remember(self, operation: str, reference: str, key: str) -> str:
        now = time.monotonic()
        request: Request = {"operation": operation, "sandbox": reference, "key": key}
        try:
            answer = await self._ask(request, _ANSWER_SECONDS)
        except TransientError:
            known = self._kept.get((reference, key))
            if known is None or known[0] < now:
                raise
            return known[1]
        if not answer.get("ok"):
            self._kept.pop((reference, key), None)
            raise _error_of(answer)
        sandbox_id = str(answer.get("sandbox_id", ""))
        if len(self._kept) >= _KEPT_MAX:
            self._kept.clear()
        self._kept[reference, key] = (now + _KEPT_SECONDS, sandbox_id)
        return sandbox_id

    async def _ask(self, request: Request, seconds: float) -> Answer:
        try:
            async with asyncio.timeout(seconds):
                return await ask(self._path, request)
        except (OSError, TimeoutError, ValueError, asyncio.LimitOverrunError) as error:
            raise TransientError("the manager does not answer", code="manager_away") from error


def _error_of(answer: Answer) -> AtelierError:
    code, message = str(answer.get("code", "")), str(answer.get("message", ""))
    kind = AccessDeniedError if code == "ssh_refused" else PreconditionError
    return kind(message, code=code)
