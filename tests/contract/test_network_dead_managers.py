"""What a manager had asked the network holder for when it died is not done behind the next one's back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.dead_clients import ask_and_die
from tests.network_lab import NetworkLab, network_lab, why_no_lab

from atelier.drivers.network.addresses import mac_address_of
from atelier.model.network_policy import OPEN_POLICY

NO_LAB = why_no_lab()
pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

SANDBOX = "abcdefghij23"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[NetworkLab]:
    with network_lab(tmp_path) as made:
        made.start_holder()
        yield made


async def test_a_dead_manager_takes_and_frees_no_slot(lab: NetworkLab) -> None:
    assert lab.holder is not None
    pid, control = lab.holder.pid, lab.run.network_socket
    before = lab.state()
    slot = {"sandbox_id": SANDBOX, "lease": 0, "mac_address": mac_address_of(SANDBOX), "policy": OPEN_POLICY.to_json()}
    ask_and_die(pid, control, operation="ensure_slot", **slot)
    # Two rounds: whatever came before them has been served by then.
    for _ in range(2):
        assert await lab.driver().list_slots() == []
    assert lab.state() == before
    await lab.driver().ensure_slot(SANDBOX, 0)
    ask_and_die(pid, control, operation="ensure_slots_absent", sandbox_ids=[SANDBOX])
    for _ in range(2):
        assert await lab.driver().list_slots() == [SANDBOX]
