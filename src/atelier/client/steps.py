"""Orders that take several calls, said once without I/O as generators, and carried out blocking or on asyncio.

Used by ``sandbox_life.py``, ``sandbox.py`` and ``snapshots.py``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import TypeAlias, TypeVar

from atelier.client.call import Call
from atelier.client.connection import AsyncConnection, Connection

D = TypeVar("D")

POLL_SECONDS = 0.5

Steps: TypeAlias = Generator[Call[D] | float, D | None, D]
"""Calls to send, whose answers come back, and pauses in seconds. Ends with the thing as it is then."""


def carry_out(connection: Connection, steps: Steps[D]) -> D:
    answer: D | None = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = None
        if isinstance(step, Call):
            answer = connection.send(step)
        else:
            time.sleep(step)


async def carry_out_async(connection: AsyncConnection, steps: Steps[D]) -> D:
    answer: D | None = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = None
        if isinstance(step, Call):
            answer = await connection.send(step)
        else:
            await asyncio.sleep(step)
