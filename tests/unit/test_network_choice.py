"""Which network a manager chooses, and what becomes of the one before."""

from __future__ import annotations

import pytest

from atelier.config.settings import NetworkChoice, NetworkHome, load_settings
from atelier.drivers.network.fake import FakeNetwork
from atelier.drivers.network.succession import SucceededNetwork
from atelier.host.checks.local import CheckResult, CheckStatus
from atelier.manager.network_choice import choose_network, explain_network
from atelier.model.errors import InvalidRequestError
from atelier.model.network_policy import EgressMode, EgressPolicy, NetworkPolicy

FINE = CheckResult("network", CheckStatus.OK, "all is there")
LACKING = CheckResult("network", CheckStatus.FAILED, "pasta is not installed", "apt-get install passt")
CLOSED_POLICY = NetworkPolicy(EgressPolicy(EgressMode.NONE))


@pytest.mark.parametrize(
    ("choice", "found", "bridged", "statuses"),
    [
        (NetworkChoice.AUTO, [FINE], True, ["ok"]),
        (NetworkChoice.AUTO, [LACKING], False, ["warning"]),
        (NetworkChoice.BRIDGE, [LACKING], True, ["failed"]),
        (NetworkChoice.CLOSED, [FINE], False, ["ok"]),
    ],
)
def test_the_choice(
    choice: NetworkChoice,
    found: list[CheckResult],
    bridged: bool,
    statuses: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = choose_network(choice, lambda: found)
    assert chosen.bridged is bridged
    assert [result.status for result in explain_network(choice, lambda: found)] == statuses
    falls_back = choice is NetworkChoice.AUTO and not bridged
    assert ("apt-get install passt" in chosen.missing) is falls_back
    assert ("apt-get install passt" in caplog.text) is falls_back


async def test_what_runs_keeps_its_network_until_it_starts_anew() -> None:
    former, present = FakeNetwork(), FakeNetwork()
    await former.ensure_slot("aaaaaaaaaaaa", 0)
    await former.ensure_slot("bbbbbbbbbbbb", 1)
    network = SucceededNetwork(present, former)
    await network.ensure_slot("cccccccccccc", 2)
    assert await network.list_slots() == ["aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"]

    await network.set_policy("aaaaaaaaaaaa", CLOSED_POLICY)
    assert former.policies["aaaaaaaaaaaa"] == CLOSED_POLICY
    await network.set_policy("cccccccccccc", CLOSED_POLICY)
    assert present.policies["cccccccccccc"] == CLOSED_POLICY
    assert set(await network.read_usage()) == {"aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"}

    await network.ensure_slot("aaaaaaaaaaaa", 0)
    await network.ensure_slot_absent("bbbbbbbbbbbb")
    assert await former.list_slots() == []
    assert await present.list_slots() == ["aaaaaaaaaaaa", "cccccccccccc"]


def test_where_the_bridge_is() -> None:
    settings = load_settings(environment={"HOME": "/x"})
    assert (settings.network_home, settings.bridge_name) == (NetworkHome.PRIVATE, "br0")
    settings = load_settings(
        environment={"HOME": "/x", "ATELIER_NETWORK_HOME": "host", "ATELIER_BRIDGE_NAME": "sandboxes"}
    )
    assert (settings.network_home, settings.bridge_name) == (NetworkHome.HOST, "sandboxes")


@pytest.mark.parametrize("name", ["", "lo", "all", "x" * 16, "br 0", 'br0"', "-x", "br/0", "brücke"])
def test_what_cannot_be_a_bridges_name_is_said_before_anything_starts(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="ATELIER_BRIDGE_NAME") as refused:
        load_settings(environment={"HOME": "/x", "ATELIER_BRIDGE_NAME": name})
    assert refused.value.code == "invalid_setting"
