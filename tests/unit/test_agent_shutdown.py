"""That the guest's end begins once, and anew only if it failed. The end itself is shown in real guests only."""

from __future__ import annotations

import asyncio

import pytest

from atelier.guest_agent import shutdown
from atelier.guest_agent.gate import Gate
from atelier.guest_agent.quiesce import Quiesce


async def test_the_end_begins_once_and_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[asyncio.Event] = []
    quiesce = Quiesce(Gate(), touches_system=False)

    async def end(_: Quiesce) -> None:
        begun.append(asyncio.Event())
        await begun[-1].wait()
        raise OSError("as told")

    monkeypatch.setattr(shutdown, "_end", end)
    monkeypatch.setattr(shutdown, "_ending", None)
    shutdown.begin(quiesce)
    shutdown.begin(quiesce)
    await asyncio.sleep(0)
    assert len(begun) == 1
    begun[0].set()
    assert shutdown._ending is not None
    with pytest.raises(OSError, match="as told"):
        await shutdown._ending
    shutdown.begin(quiesce)
    await asyncio.sleep(0)
    assert len(begun) == 2
    shutdown._ending.cancel()
