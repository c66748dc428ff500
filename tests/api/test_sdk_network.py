"""The network of ``Sandbox`` and ``AsyncSandbox``, against a manager in mock mode."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from tests.running_manager import RunningManager

from atelier import AsyncSandbox, Sandbox
from atelier.client.connection import AsyncConnection, Connection
from atelier.client.environment import Endpoint
from atelier.model.errors import HostError, InvalidRequestError, NotFoundError, TransientError
from atelier.model.network_policy import EgressMode
from atelier.schemas.networks import Egress, NetworkPolicy

from .manager_inside import ManagerInside


@pytest.fixture
def connection(manager: RunningManager, api: httpx.Client) -> Iterator[Connection]:
    del api  # destroys what a test leaves
    with Connection(Endpoint(manager.url, manager.key)) as opened:
        yield opened


def said(network: NetworkPolicy) -> tuple[str, list[str], list[str]]:
    return network.egress.mode.value, network.egress.networks, network.egress.domains


def test_a_network(connection: Connection) -> None:
    with Sandbox.create(connection=connection) as box:
        shown = box.network()
        assert (said(shown.policy), shown.in_force, shown.connected) == (("all", [], []), True, True)
        assert said(box.set_network({"egress": {"mode": "none"}}).policy) == ("none", [], [])
        assert said(box.allow("github.com", "10.1.0.0/16").policy) == ("list", ["10.1.0.0/16"], ["github.com"])
        assert said(box.deny("github.com").policy) == ("list", ["10.1.0.0/16"], [])
        with pytest.raises(NotFoundError) as absent:
            box.deny("github.com")
        assert absent.value.code == "egress_entry_not_found"
        limited = box.change_network(download_kbit_per_second=1000, upload_kbit_per_second=64, egress_mode="all")
        assert said(limited.policy) == ("all", ["10.1.0.0/16"], [])
        lifted = box.change_network(upload_kbit_per_second=None)
        assert (lifted.policy.download_kbit_per_second, lifted.policy.upload_kbit_per_second) == (1000, None)
        whole = NetworkPolicy(egress=Egress(mode=EgressMode.LIST, networks=[], domains=["a.com"]))
        assert box.set_network(whole).policy == whole
        assert box.network().policy == whole


def test_what_is_wrong_is_said_before_it_is_sent_or_by_the_manager(connection: Connection) -> None:
    with Sandbox.create(connection=connection) as box:
        for wrong in ({}, {"egress": {"mode": "some"}}, {"egress": {"mode": "all"}, "rate": 1}):
            with pytest.raises(InvalidRequestError) as refused:
                box.set_network(wrong)
            assert "set the network policy" in refused.value.message
            with pytest.raises(InvalidRequestError):
                Sandbox.create(network=wrong, connection=connection)
        with pytest.raises(InvalidRequestError):
            box.change_network(download_kbit_per_second=1)
        with pytest.raises(InvalidRequestError) as named:
            box.set_network({"egress": {"mode": "list", "domains": ["a.*.com"]}})
        assert (named.value.code, "a.*.com" in named.value.message) == ("invalid_domain", True)
        with pytest.raises(InvalidRequestError):
            box.allow("github.com")  # in mode all
        assert said(box.network().policy) == ("all", [], [])


def test_a_sandbox_is_created_with_its_policy(connection: Connection) -> None:
    policy = {"egress": {"mode": "list", "domains": ["github.com"]}, "upload_kbit_per_second": 500}
    with Sandbox.create(network=policy, connection=connection) as box:
        assert said(box.network().policy) == ("list", [], ["github.com"])
        assert box.network().policy.upload_kbit_per_second == 500


async def test_the_same_on_asyncio_and_what_is_not_in_force_yet(inside: ManagerInside) -> None:
    key = inside.client.headers["Authorization"].removeprefix("Bearer ")
    transport = httpx.ASGITransport(inside.installation.application)
    async with AsyncConnection(Endpoint("http://127.0.0.1", key), transport=transport) as connection:
        closed = {"egress": {"mode": "none"}}
        async with await AsyncSandbox.create(network=closed, connection=connection) as box:
            assert said((await box.network()).policy) == ("none", [], [])
            assert said((await box.allow("github.com")).policy) == ("list", [], ["github.com"])
            assert said((await box.deny("github.com")).policy) == ("list", [], [])
            assert said((await box.change_network(egress_mode=EgressMode.ALL)).policy) == ("all", [], [])
            inside.network.faults.fail_next("set_policy", HostError("nft says no"))
            with pytest.raises(TransientError) as pending:
                await box.set_network(closed)
            assert pending.value.code == "network_policy_pending"
            assert said((await box.network()).policy) == ("none", [], [])
