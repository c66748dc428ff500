"""Lets old events go while the manager runs. Started by ``manager.installation``, cancelled when that closes."""

from __future__ import annotations

import asyncio
import logging

from atelier.model.errors import AtelierError
from atelier.services.events import EventService

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 60.0


async def trim_outbox(events: EventService) -> None:
    """For ever: trim, then rest. A full disk or a locked database is tried again after the rest."""
    while True:
        try:
            if gone := await events.trim():
                logger.info("%d old events are gone", gone)
        except AtelierError as error:
            logger.warning("cannot trim the events: %s", error)
        await asyncio.sleep(_PAUSE_SECONDS)
