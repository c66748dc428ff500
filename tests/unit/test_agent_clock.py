"""When the guest's clock is stepped, when it is slewed, and what the kernel is given of a long way, second by second."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from atelier.guest_agent import clock

MS = 1_000_000
SECOND = 1000 * MS


class Kernel:
    """A kernel that slews a quarter of what is left in each second, as the real one does. ``offset`` is how far the
    clock is ahead."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.pending = 0
        self.given: list[int] = []
        self.steps: list[int] = []

    def step(self, by_ns: int) -> None:
        self.steps.append(by_ns)
        self.offset += by_ns
        self.pending = 0

    def give(self, by_ns: int) -> None:
        self.given.append(by_ns)
        self.pending = by_ns

    def let_a_second_pass(self) -> None:
        done = self.pending // 4
        self.pending -= done
        self.offset += done


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel(0)

    async def pass_a_second(_: float) -> None:
        made.let_a_second_pass()

    monkeypatch.setattr(clock, "_step", made.step)
    monkeypatch.setattr(clock, "_give", made.give)
    monkeypatch.setattr(clock, "_pending", lambda: made.pending)
    monkeypatch.setattr(clock, "_slewing", None)
    monkeypatch.setattr(clock.asyncio, "sleep", pass_a_second)
    yield made


async def settle() -> None:
    if clock._slewing is not None:
        await clock._slewing


@pytest.mark.parametrize(
    ("offset", "steps"),
    [
        (0, False),
        (-500 * MS, False),
        (-501 * MS, True),
        (-86400 * SECOND, True),
        (1, False),
        (5 * SECOND, False),
        (60 * SECOND, False),
        (60 * SECOND + 1, True),
        (86400 * SECOND, True),
    ],
)
def test_what_is_stepped(offset: int, steps: bool) -> None:
    assert clock.needs_step(offset) is steps


@pytest.mark.parametrize("offset", [-2 * SECOND, 61 * SECOND])
async def test_a_step_is_made_at_once_and_whole(kernel: Kernel, offset: int) -> None:
    kernel.offset = offset
    clock.correct(offset)
    assert kernel.offset == 0
    assert kernel.given == []


@pytest.mark.parametrize("offset", [-150 * MS, 1 * MS, 200 * MS])
async def test_a_short_way_is_the_kernels_alone(kernel: Kernel, offset: int) -> None:
    kernel.offset = offset
    clock.correct(offset)
    assert clock._slewing is None
    assert kernel.given == [-offset]
    assert kernel.steps == []


@pytest.mark.parametrize("offset", [-500 * MS, 201 * MS, 5 * SECOND, 60 * SECOND])
async def test_a_long_way_goes_on_until_it_is_done_and_never_fast(kernel: Kernel, offset: int) -> None:
    kernel.offset = offset
    clock.correct(offset)
    await settle()
    assert kernel.steps == []
    assert max(map(abs, kernel.given)) <= clock.SLEW_AT_ONCE_NS, "5 % of a second at most"
    # What is left is in the kernel's hands.
    assert kernel.offset + kernel.pending == 0
    assert abs(kernel.offset) <= clock.SLEW_AT_ONCE_NS


async def test_a_new_correction_takes_the_place_of_the_one_under_way(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    resting = asyncio.Event()

    async def rest(_: float) -> None:
        await resting.wait()

    monkeypatch.setattr(clock.asyncio, "sleep", rest)
    kernel.offset = 5 * SECOND
    clock.correct(kernel.offset)
    first = clock._slewing
    assert first is not None
    kernel.offset = 10 * MS
    clock.correct(kernel.offset)
    assert kernel.given == [-200 * MS, -10 * MS]
    await asyncio.wait({first})
    assert first.cancelled()
    clock.correct(5 * SECOND)
    second = clock._slewing
    clock.correct(-2 * SECOND)
    assert second is not None
    await asyncio.wait({second})
    assert second.cancelled()
    assert kernel.steps == [2 * SECOND]
