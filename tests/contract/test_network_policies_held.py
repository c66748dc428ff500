"""Network policies from the lifecycle down to the kernel: a real network holder, which ends and comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.lifecycle.conftest import Host
from tests.network_lab import NetworkLab, network_lab, why_no_lab

from atelier.db.sandbox_networks import SandboxNetwork, SandboxNetworkRepository
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import TransientError
from atelier.model.network_policy import EgressMode, EgressPolicy, NetworkPolicy
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState

NO_LAB = why_no_lab()
pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

FIRST, SECOND, THIRD = "203.0.113.16/28", "203.0.113.32/28", "203.0.113.48/28"


def listed(network: str) -> NetworkPolicy:
    return NetworkPolicy(EgressPolicy.make(EgressMode.LIST, [network]))


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[NetworkLab]:
    with network_lab(tmp_path) as made:
        made.start_holder()
        yield made


@pytest.fixture
async def host(lab: NetworkLab, tmp_path: Path) -> AsyncIterator[Host]:
    """All fake but the network."""
    made = Host(tmp_path)
    made.network = lab.driver()  # type: ignore[assignment]
    made.database.open()
    yield made
    for lifecycle in made.lifecycles:
        await lifecycle.close()
    made.database.close()


def stored(host: Host, sandbox: Sandbox) -> SandboxNetwork:
    with host.database.read() as connection:
        return SandboxNetworkRepository().get(connection, sandbox.id)


def in_force(host: Host, lifecycle: SandboxLifecycle, sandbox: Sandbox) -> bool:
    return lifecycle.network_policies.is_in_force(sandbox.id, is_pending=stored(host, sandbox).is_pending)


def rules(lab: NetworkLab) -> set[str]:
    """Which of the networks the kernel knows of."""
    found = lab.in_home("nft", "list", "ruleset")
    return {network for network in (FIRST, SECOND, THIRD) if network in found}


async def test_what_is_stored_comes_to_hold_whatever_the_holder_does(host: Host, lab: NetworkLab) -> None:
    lifecycle = host.lifecycle()
    sandbox = await lifecycle.start_create("one", SandboxSpec(), listed(FIRST))
    settled = await lifecycle.wait_settled(sandbox.id, 60)
    assert settled is not None
    assert settled.state is SandboxState.RUNNING, settled.failure_message
    assert stored(host, sandbox).address == str(lab.plan.address_of(0))
    assert stored(host, sandbox).gateway == str(lab.plan.gateway)
    assert rules(lab) == {FIRST}
    assert set(await host.network.read_usage()) == {sandbox.id}

    await lifecycle.network_policies.change(sandbox.id, lambda _: listed(SECOND))
    assert rules(lab) == {SECOND}

    lab.stop_holder()
    with pytest.raises(TransientError) as pending:
        await lifecycle.network_policies.change(sandbox.id, lambda _: listed(THIRD))
    assert pending.value.code == "network_policy_pending"
    assert not in_force(host, lifecycle, sandbox)
    assert rules(lab) == {SECOND}, "the old one holds meanwhile"

    lab.start_holder()
    lifecycle.network_policies.doubt_all()
    await lifecycle.network_policies.enforce_pending()
    assert in_force(host, lifecycle, sandbox)
    assert rules(lab) == {THIRD}

    await lifecycle.destroy(sandbox.id)
    assert rules(lab) == set()


async def test_the_longest_policy_is_taken(host: Host, lab: NetworkLab) -> None:
    """A thousand names of 253 characters: every bound on the way is wide enough."""
    label = "x" * 62
    names = [f"{label}.{label}.{label}.{number:04}{'y' * 50}.example" for number in range(1000)]
    assert {len(name) for name in names} <= set(range(240, 254))
    lifecycle = host.lifecycle()
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await lifecycle.wait_settled(sandbox.id, 60)
    policy = NetworkPolicy(EgressPolicy.make(EgressMode.LIST, (), names))
    await lifecycle.network_policies.change(sandbox.id, lambda _: policy)
    assert in_force(host, lifecycle, sandbox)
    lab.stop_holder()
    lab.start_holder()
    # It knows it from its own file: what is given again changes nothing.
    lifecycle.network_policies.doubt_all()
    await lifecycle.network_policies.enforce_pending()
    assert in_force(host, lifecycle, sandbox)
    assert stored(host, sandbox).policy == policy
