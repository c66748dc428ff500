"""Runs in a guest what nearly every use of a sandbox runs, before it is anybody's.

Used by ``templates`` and, for guests that wait in a warm pool, by ``sandbox_create``. What is run for the first time costs
several times as much: its files are read, the guest agent imports its modules, memory is copied on its first write, and an
emulated machine translates all code anew, also one that was restored.
"""

from __future__ import annotations

import logging

from atelier.drivers.guest.interface import GuestDriver
from atelier.model.errors import AtelierError, GuestUnreachableError
from atelier.model.guest import ProcessSpec

_logger = logging.getLogger(__name__)

_PROGRAMS = (("true",), ("sh", "-c", ":"), ("bash", "-l", "-c", ":"), ("python3", "-c", "pass"), ("true",))
"""An image may lack some. The last is what finds the most prepared."""
_LONGEST_SECONDS = 60.0


async def warm_up(guests: GuestDriver, sandbox_id: str) -> None:
    """As its default user; nothing of it is left but what lies in memory. Raises GuestUnreachableError."""
    for arguments in _PROGRAMS:
        spec = ProcessSpec(arguments, timeout_seconds=_LONGEST_SECONDS)
        try:
            async with guests.start_process(sandbox_id, spec) as events:
                async for _ in events:
                    pass
        except GuestUnreachableError:
            raise
        except AtelierError as error:
            _logger.debug("sandbox %s is not warmed by %s: %s", sandbox_id, arguments[0], error)
