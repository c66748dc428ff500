"""Freeing slots together: the driver gathers those that are asked for at once, the holder tells whose failure is whose."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from atelier.drivers.network.bridge import BridgeNetwork
from atelier.model.errors import AtelierError, ConflictError, HostError, TransientError
from atelier.network_holder.freeing import free_together


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


def test_all_are_freed_together() -> None:
    home = Home()
    assert free_together(home, ["one", "two"]) == {}
    assert home.told == [["one", "two"]]


def test_one_that_fails_harms_no_other() -> None:
    home = Home(stubborn={"two"})
    failed = free_together(home, ["one", "two", "three"])
    assert {sandbox_id: str(error) for sandbox_id, error in failed.items()} == {"two": "two is stubborn"}
    assert home.told == [["one", "two", "three"], ["one"], ["two"], ["three"]]


class Holder:
    """Answers what it is told to, once it may."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "network.sock"
        self.asked: list[list[str]] = []
        self.answer: dict[str, Any] | bytes = {"ok": True, "failed": {}}
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(await reader.readline())
        assert request["operation"] == "ensure_slots_absent"
        self.asked.append(request["sandbox_ids"])
        await self.may_answer.wait()
        writer.write(self.answer if isinstance(self.answer, bytes) else json.dumps(self.answer).encode() + b"\n")
        writer.close()


@pytest.fixture
async def holder() -> AsyncIterator[Holder]:
    with tempfile.TemporaryDirectory(prefix="atl-") as name:  # short: a socket lies below it
        made = Holder(Path(name))
        server = await asyncio.start_unix_server(made.serve, made.path)
        yield made
        server.close()


async def test_what_is_asked_at_once_is_one_request(holder: Holder) -> None:
    network = BridgeNetwork(holder.path)
    ids = [f"box{number}" for number in range(50)]
    await asyncio.gather(*(network.ensure_slot_absent(each) for each in [*ids, "box0"]))
    await network.ensure_slot_absent("late")
    assert holder.asked == [ids, ["late"]]


async def test_what_is_asked_meanwhile_is_the_next_request(holder: Holder) -> None:
    network = BridgeNetwork(holder.path)
    holder.may_answer.clear()
    first = asyncio.create_task(network.ensure_slot_absent("one"))
    while not holder.asked:
        await asyncio.sleep(0.01)
    others = [asyncio.create_task(network.ensure_slot_absent(each)) for each in ("two", "one", "three")]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in (first, *others))
    holder.may_answer.set()
    await asyncio.gather(first, *others)
    assert holder.asked == [["one"], ["two", "one", "three"]], "the second is asked again: it may have come back"


async def test_each_has_its_own_failure(holder: Holder) -> None:
    network = BridgeNetwork(holder.path)
    refusal = {"ok": False, "code": "slot_in_use", "message": "somebody holds it", "hint": "wait"}
    holder.answer = {"ok": True, "failed": {"two": refusal}}
    outcomes = await asyncio.gather(
        *(network.ensure_slot_absent(each) for each in ("one", "two", "three")), return_exceptions=True
    )
    assert [outcomes[0], outcomes[2]] == [None, None]
    assert isinstance(outcomes[1], ConflictError)
    assert (outcomes[1].code, outcomes[1].hint) == ("slot_in_use", "wait")
    assert outcomes[1].message == "freeing the network slot of two: somebody holds it"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", TransientError),
        (b"nonsense\n", HostError),
        ({"ok": True}, HostError),
        ({"ok": True, "failed": ["one"]}, HostError),
        ({"ok": True, "failed": {"one": "no"}}, HostError),
        ({"ok": False, "code": "internal", "message": "a mistake"}, HostError),
    ],
)
async def test_an_answer_that_is_none_is_everybodys_failure_and_the_next_is_tried(
    holder: Holder, answer: dict[str, Any] | bytes, kind: type[AtelierError]
) -> None:
    network = BridgeNetwork(holder.path)
    holder.answer = answer
    outcomes = await asyncio.gather(
        *(network.ensure_slot_absent(each) for each in ("one", "two")), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [kind, kind]
    holder.answer = {"ok": True, "failed": {}}
    await network.ensure_slot_absent("one")


async def test_who_stops_waiting_leaves_the_others_waiting_rightly(holder: Holder) -> None:
    network = BridgeNetwork(holder.path)
    holder.may_answer.clear()
    first, second = (asyncio.create_task(network.ensure_slot_absent(each)) for each in ("one", "two"))
    while not holder.asked:
        await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not second.done()
    holder.may_answer.set()
    await second
    assert holder.asked == [["one", "two"]], "what was asked for is done"
