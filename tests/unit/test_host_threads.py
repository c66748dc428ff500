"""Work in a thread ends before its caller goes on, also when that is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from atelier.host.threads import run_in_thread


async def test_what_it_returns_and_raises_comes_back() -> None:
    assert await run_in_thread(lambda given_up: given_up.is_set()) is False

    def fail(given_up: threading.Event) -> None:
        raise KeyError(given_up.is_set())

    with pytest.raises(KeyError):
        await run_in_thread(fail)


@pytest.mark.parametrize("fails", [False, True])
async def test_cancelled_work_is_told_and_waited_for(fails: bool) -> None:
    started, ended = threading.Event(), threading.Event()

    def work(given_up: threading.Event) -> None:
        started.set()
        assert given_up.wait(60)
        ended.set()
        if fails:
            raise InterruptedError

    working = asyncio.create_task(run_in_thread(work))
    assert await asyncio.to_thread(started.wait, 60)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert ended.is_set()
