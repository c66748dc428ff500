"""Work that blocks for long, in a thread that can be told to give up.

Called where files are copied or read as a whole. A thread cannot be stopped from outside: the work looks at its event
between two pieces.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


async def run_in_thread(work: Callable[[threading.Event], _Result]) -> _Result:
    """Run ``work`` in a thread. On cancellation its event is set, and its end waited for: nothing goes on unseen."""
    given_up = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(work, given_up))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        given_up.set()
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # seen: whoever cancelled does not ask for it
        raise
