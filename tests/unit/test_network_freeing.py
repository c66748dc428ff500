"""Freeing slots together: who is in whose company, what comes in its turn, and whose error is whose."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from atelier.model.errors import HostError
from atelier.network_holder.freeing import SlotFreeing


@dataclass
class Home:
    """Remembers what it was told. What is in ``stubborn`` cannot be freed, and nothing together with it."""

    stubborn: set[str] = field(default_factory=set)
    told: list[list[str]] = field(default_factory=list)

    def ensure_absent(self, sandbox_id: str) -> None:
        self.told.append([sandbox_id])
        if sandbox_id in self.stubborn:
            raise HostError(f"{sandbox_id} is stubborn")

    def ensure_all_absent(self, sandbox_ids: Sequence[str]) -> None:
        self.told.append(list(sandbox_ids))
        if self.stubborn & set(sandbox_ids):
            raise HostError("not together")


@dataclass
class Desk:
    home: Home = field(default_factory=Home)
    turns: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.freeing = SlotFreeing(lambda: self.home, self.turns)

    async def perform(self, name: str, sandbox_id: str) -> None:
        """Another request than freeing."""
        with self.freeing.other_request(sandbox_id):
            async with self.turns:
                self.home.told.append([f"{name} {sandbox_id}"])


async def test_what_is_asked_at_once_is_freed_at_once() -> None:
    desk = Desk()
    ids = [f"box{number}" for number in range(50)]
    await asyncio.gather(*(desk.freeing.free(each) for each in ids))
    assert desk.home.told == [ids]
    await desk.freeing.free("late")
    assert desk.home.told == [ids, ["late"]]


async def test_what_is_asked_while_the_home_is_busy_is_freed_together() -> None:
    desk = Desk()
    async with desk.turns:
        asked = [asyncio.create_task(desk.freeing.free(each)) for each in ("one", "two", "one")]
        await asyncio.sleep(0.05)
        assert desk.home.told == []
    await asyncio.gather(*asked)
    assert desk.home.told == [["one", "two"]]


async def test_one_that_fails_harms_no_other() -> None:
    desk = Desk(Home(stubborn={"two"}))
    outcomes = await asyncio.gather(
        *(desk.freeing.free(each) for each in ("one", "two", "three")), return_exceptions=True
    )
    assert desk.home.told == [["one", "two", "three"], ["one"], ["two"], ["three"]]
    assert [outcomes[0], outcomes[2]] == [None, None]
    assert isinstance(outcomes[1], HostError)
    assert outcomes[1].message == "two is stubborn"
    desk.home.stubborn.clear()
    await desk.freeing.free("two")


async def test_no_freeing_overtakes_an_earlier_request_for_the_same_sandbox() -> None:
    desk = Desk()
    async with desk.turns:
        tasks = [asyncio.create_task(desk.freeing.free("other"))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(desk.perform("ensure", "box")))
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(desk.freeing.free("box")))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert desk.home.told == [["other"], ["ensure box"], ["box"]]


async def test_a_request_that_came_later_is_not_overtaken_either() -> None:
    desk = Desk()
    free = asyncio.create_task(desk.freeing.free("box"))
    await asyncio.sleep(0)
    await asyncio.gather(free, desk.perform("ensure", "box"))
    assert desk.home.told == [["box"], ["ensure box"]]


async def test_who_stops_waiting_leaves_the_others_waiting_rightly() -> None:
    desk = Desk()
    async with desk.turns:
        first, second = (asyncio.create_task(desk.freeing.free(each)) for each in ("one", "two"))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    await second
    assert desk.home.told == [["one", "two"]], "what was asked for is done"
