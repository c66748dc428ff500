"""Frees slots together. Called by ``control``.

Deleting a link makes the kernel wait until nobody can be using it, some 20 ms; fifty links deleted at once wait for that
together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

_logger = logging.getLogger(__name__)


class FreesSlots(Protocol):
    """The part of a home's slots that is needed here. Both calls are idempotent."""

    def ensure_absent(self, sandbox_id: str) -> None: ...

    def ensure_all_absent(self, sandbox_ids: Sequence[str]) -> None: ...


def free_together(slots: FreesSlots, sandbox_ids: Sequence[str]) -> dict[str, Exception]:
    """What freeing each slot raised that could not be freed, whoever else was freed with it."""
    failure = _error_of(lambda: slots.ensure_all_absent(sandbox_ids))
    if failure is None:
        return {}
    _logger.warning("%d network slots could not be freed together, so one by one: %s", len(sandbox_ids), failure)
    outcomes = {each: _error_of(lambda each=each: slots.ensure_absent(each)) for each in sandbox_ids}
    return {sandbox_id: error for sandbox_id, error in outcomes.items() if error is not None}


def _error_of(work: Callable[[], None]) -> Exception | None:
    """Also a mistake of ours: each slot has to be tried."""
    try:
        work()
    except Exception as error:
        return error
    return None
