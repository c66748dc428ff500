"""Frees slots together that are asked for at about the same time. Called by ``control``.

Deleting a link makes the kernel wait until nobody can be using it, some 20 ms; fifty links deleted at once wait for that
together. So who asks first waits a moment for company, and frees for all who have asked by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

_COMPANY_SECONDS = 0.002
"""It goes on when for so long nobody has joined. Little beside what one link alone takes."""
_COMPANY_MAX_SECONDS = 0.02

_logger = logging.getLogger(__name__)


class FreesSlots(Protocol):
    """The part of a home's slots that is needed here. Both calls are idempotent."""

    def ensure_absent(self, sandbox_id: str) -> None: ...

    def ensure_all_absent(self, sandbox_ids: Sequence[str]) -> None: ...


class SlotFreeing:
    """``slots``: those of the home, which is open when somebody asks. ``turns``: who holds it may work on them; it is given
    in the order in which it was asked for."""

    def __init__(self, slots: Callable[[], FreesSlots], turns: asyncio.Lock) -> None:
        self._slots = slots
        self._turns = turns
        self._asked: dict[str, asyncio.Future[Exception | None]] = {}
        self._others: Counter[str] = Counter()

    @contextlib.contextmanager
    def other_request(self, sandbox_id: str) -> Generator[None]:
        """Around all that another request for this sandbox waits and works: a freeing that was asked for later must not
        overtake it in company, or a slot would be made for a sandbox that is gone."""
        self._others[sandbox_id] += 1
        try:
            yield
        finally:
            self._others[sandbox_id] -= 1
            if not self._others[sandbox_id]:
                del self._others[sandbox_id]

    async def free(self, sandbox_id: str) -> None:
        """Returns when the slot is gone. Raises what freeing this very slot raised, whoever else was freed with it."""
        if sandbox_id in self._others:
            async with self._turns:
                self._slots().ensure_absent(sandbox_id)
            return
        answer = self._asked.setdefault(sandbox_id, asyncio.get_running_loop().create_future())
        async with self._turns:
            if not answer.done():
                await self._await_company()
                self._free_all()
        if (error := answer.result()) is not None:
            raise error

    async def _await_company(self) -> None:
        until = time.monotonic() + _COMPANY_MAX_SECONDS
        count = 0
        while count < len(self._asked) and time.monotonic() < until:
            count = len(self._asked)
            await asyncio.sleep(_COMPANY_SECONDS)

    def _free_all(self) -> None:
        asked, self._asked = self._asked, {}
        failure = _error_of(lambda: self._slots().ensure_all_absent(list(asked)))
        if failure is None:
            for answer in asked.values():
                answer.set_result(None)
            return
        _logger.warning("%d network slots could not be freed together, so one by one: %s", len(asked), failure)
        for sandbox_id, answer in asked.items():
            answer.set_result(_error_of(lambda sandbox_id=sandbox_id: self._slots().ensure_absent(sandbox_id)))


def _error_of(work: Callable[[], None]) -> Exception | None:
    """Also a mistake of ours: everybody who waits has to get an answer."""
    try:
        work()
    except Exception as error:
        return error
    return None
