"""Many slots freed at once, on the real kernel, in namespaces of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from tests.network_lab import INSTALLATION, NetworkLab, network_lab, why_no_lab

from atelier.model.errors import HostError
from atelier.model.ids import new_sandbox_id
from atelier.model.network_policy import OPEN_POLICY, EgressMode, EgressPolicy, NetworkPolicy

NO_LAB = why_no_lab()
pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

MANY = 50
POLICIES = (
    OPEN_POLICY,
    NetworkPolicy(EgressPolicy(EgressMode.NONE)),
    NetworkPolicy(
        EgressPolicy(EgressMode.LIST, (IPv4Network("192.0.2.0/24"),), ("example.org",)), upload_kbit_per_second=8000
    ),
)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[NetworkLab]:
    with network_lab(tmp_path) as made:
        made.start_holder()
        yield made


def tap_of(sandbox_id: str) -> str:
    return f"at{INSTALLATION}{sandbox_id[:8]}"


async def make_slots(lab: NetworkLab, count: int, first_lease: int = 0) -> list[str]:
    ids = [new_sandbox_id() for _ in range(count)]
    for lease, sandbox in enumerate(ids, first_lease):
        await lab.driver().ensure_slot(sandbox, lease, POLICIES[lease % len(POLICIES)])
    return ids


async def free(lab: NetworkLab, ids: list[str]) -> list[BaseException | None]:
    driver = lab.driver()
    return await asyncio.gather(*(driver.ensure_slot_absent(each) for each in ids), return_exceptions=True)


async def test_fifty_at_once_are_gone_and_the_others_are_as_before(lab: NetworkLab) -> None:
    kept = await make_slots(lab, 10)
    before = lab.state()
    for _ in range(2):
        freed = await make_slots(lab, MANY, len(kept))
        assert await free(lab, freed) == [None] * MANY
        assert lab.state() == before, "each asker's slot is gone when it has its answer"
        assert sorted(each.stem for each in lab.run.network_policies.iterdir()) == sorted(kept)
    assert await lab.driver().list_slots() == sorted(kept)
    assert not lab.ask("check")["put_back"]


async def test_freeing_and_making_at_once(lab: NetworkLab) -> None:
    old = await make_slots(lab, 20)
    new = [new_sandbox_id() for _ in range(20)]
    driver = lab.driver()
    work = [
        task
        for lease, (gone, come) in enumerate(zip(old, new, strict=True), len(old))
        for task in (driver.ensure_slot_absent(gone), driver.ensure_slot(come, lease), driver.ensure_slot_absent(gone))
    ]
    await asyncio.gather(*work)
    assert await driver.list_slots() == sorted(new)
    links = lab.in_home("ip", "-br", "link")
    assert [tap_of(each) in links for each in [*old, *new]] == [False] * 20 + [True] * 20


async def test_what_a_stranger_removed_harms_nobody(lab: NetworkLab) -> None:
    kept = await make_slots(lab, 3)
    before = lab.state()
    ids = await make_slots(lab, 12, len(kept))
    lab.in_home("ip", "link", "delete", tap_of(ids[3]))
    lab.in_home("ip", "link", "delete", tap_of(ids[7]))
    assert await free(lab, ids) == [None] * 12
    assert lab.state() == before

    ids = await make_slots(lab, 12, len(kept))
    lab.in_home("nft", "delete", "table", "netdev", f"atelier_{INSTALLATION}")
    assert await free(lab, ids) == [None] * 12
    lab.ask("check")
    assert lab.state() == before


async def test_one_that_cannot_be_freed_keeps_no_other_from_it(lab: NetworkLab) -> None:
    """In the place of a TAP a stranger has put a link that the kernel deletes for nobody."""
    before = lab.state()
    ids = await make_slots(lab, 12)
    stubborn = ids[5]
    lab.in_home("ip", "link", "delete", tap_of(stubborn))
    lab.in_home("ip", "link", "set", "lo", "name", tap_of(stubborn))
    for wave in (ids[:10], [*ids[10:], stubborn]):
        outcomes = dict(zip(wave, await free(lab, wave), strict=True))
        assert isinstance(outcomes.pop(stubborn), HostError)
        assert set(outcomes.values()) == {None}
        assert not set(outcomes) & set(await lab.driver().list_slots())
    lab.in_home("ip", "link", "set", tap_of(stubborn), "name", "lo")
    assert await free(lab, [stubborn]) == [None]
    assert lab.state() == before


async def test_a_freeing_that_was_broken_off_takes_nobody_along(lab: NetworkLab) -> None:
    """The holder ended between putting links into the group that is deleted and deleting it."""
    broken_off, other = await make_slots(lab, 2)
    lab.in_home("ip", "link", "set", tap_of(broken_off), "group", "2")
    lab.stop_holder()
    lab.start_holder()
    assert await free(lab, [other]) == [None]
    assert await lab.driver().list_slots() == [broken_off]
    assert tap_of(broken_off) in lab.in_home("ip", "-br", "link")
    assert await free(lab, [broken_off]) == [None]
    assert tap_of(broken_off) not in lab.in_home("ip", "-br", "link")
