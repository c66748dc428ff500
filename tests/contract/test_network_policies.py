"""What each network policy lets pass, with real packets: at first, after a change, and after whatever befalls the holder.

In namespaces of the test's own, with guests that are this process at the end of their TAPs.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
from tests.contract.packet_flows import TcpFlow, UdpFlow, as_neighbour, is_dead, is_open, reached_wrongly
from tests.contract.packet_stage import Stage
from tests.contract.test_network_packets import GUEST, NEIGHBOUR, NO_LAB, holder_asleep, open_stage, wait_until
from tests.network_frames import UDP, ipv4, udp
from tests.network_lab import (
    ELSEWHERE,
    INSTALLATION,
    INTERNET,
    NEIGHBOUR_OF_HOST,
    PRIVATE,
    Home,
    NetworkLab,
    network_lab,
    why_no_lab,
)

from atelier.model.network_policy import OPEN_POLICY, EgressMode, EgressPolicy, NetworkPolicy
from atelier.network_holder.rules import MAX_FLOWS

pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

CLOSED = NetworkPolicy(EgressPolicy.make(EgressMode.NONE))
MANY = [f"192.0.{number}.0/25" for number in range(40)]
"""Too many for rules of their own; ELSEWHERE is in one of them."""
ADJACENT = [text for number in range(0, 40, 2) for text in (f"192.0.{number}.0/24", f"192.0.{number + 1}.0/25")]
"""As above; nft may list two of them as one range."""


def listed(*networks: str, domains: tuple[str, ...] = ()) -> NetworkPolicy:
    return NetworkPolicy(EgressPolicy.make(EgressMode.LIST, networks, domains))


def open_and(*networks: str) -> NetworkPolicy:
    return NetworkPolicy(EgressPolicy.make(EgressMode.ALL, networks))


@pytest.fixture(params=list(Home))
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NetworkLab]:
    """Of each home."""
    if missing := why_no_lab(request.param):
        pytest.skip(missing)
    with network_lab(tmp_path, request.param) as made:
        yield made


@pytest.fixture
async def stage(lab: NetworkLab) -> AsyncIterator[Stage]:
    lab.start_holder()
    async with AsyncExitStack() as stack:
        yield await open_stage(lab, stack)


# --- what is reached --------------------------------------------------------------------------------------------------


async def test_each_policy_opens_what_it_says_and_nothing_else(stage: Stage) -> None:
    driver = stage.lab.driver()
    for policy, places in (
        (listed(), []),
        (listed("203.0.113.0/24"), [INTERNET]),
        (listed(INTERNET, ELSEWHERE), [INTERNET, ELSEWHERE]),
        (listed("192.168.0.0/16", "10.0.0.0/8"), [PRIVATE[0], PRIVATE[2]]),
        (listed("198.51.100.0/24"), [NEIGHBOUR_OF_HOST]),
        (listed("0.0.0.0/0"), [INTERNET, ELSEWHERE, *PRIVATE, NEIGHBOUR_OF_HOST]),
        (listed(*MANY), [ELSEWHERE]),
        (listed(*ADJACENT), [ELSEWHERE]),
        (listed(*ADJACENT[:8]), [ELSEWHERE]),
        (listed(domains=("example.org",)), []),
        (CLOSED, []),
        (open_and("172.16.0.0/12"), [INTERNET, ELSEWHERE, PRIVATE[1]]),
        (OPEN_POLICY, [INTERNET, ELSEWHERE]),
    ):
        await driver.set_policy(GUEST, policy)
        assert reached_wrongly(stage, *places) == [], policy
        # After another's transaction the holder looks at all of its own.
        stage.lab.in_home("nft", "add table inet stranger; delete table inet stranger")
        assert not stage.lab.ask("check")["put_back"], policy
    assert "put back" not in stage.lab.log.read_text(), "no false alarm"
    assert reached_wrongly(as_neighbour(stage), INTERNET, ELSEWHERE) == [], "the neighbour's own was never changed"


async def test_a_policy_is_in_force_from_the_first_packet(lab: NetworkLab) -> None:
    lab.start_holder()
    async with AsyncExitStack() as stack:
        stage = await open_stage(lab, stack, listed(ELSEWHERE))
        assert reached_wrongly(stage, ELSEWHERE) == []
        assert reached_wrongly(as_neighbour(stage), INTERNET, ELSEWHERE) == []


async def test_a_slot_that_is_taken_again_has_the_policy_that_comes_with_it(stage: Stage) -> None:
    driver = stage.lab.driver()
    await driver.ensure_slot(GUEST, 0, CLOSED)
    assert reached_wrongly(stage) == []
    await driver.ensure_slot(GUEST, 0, listed(INTERNET))
    assert reached_wrongly(stage, INTERNET) == []


# --- flows that were open ---------------------------------------------------------------------------------------------


async def test_a_change_revokes_open_flows_and_leaves_those_that_stay_allowed(stage: Stage) -> None:
    driver = stage.lab.driver()
    with ExitStack() as stack:
        here = [make(stage, stack, INTERNET, port) for make, port in ((UdpFlow, 5001), (TcpFlow, 5002))]
        there = [make(stage, stack, ELSEWHERE, port) for make, port in ((UdpFlow, 5003), (TcpFlow, 5004))]
        neighbours = TcpFlow(as_neighbour(stage), stack, INTERNET, 5005)
        assert all(flow.say() and is_open(flow) for flow in [*here, *there, neighbours]), "what is revoked was open"
        await driver.set_policy(GUEST, listed(ELSEWHERE))
        assert all(map(is_dead, here))
        assert all(map(is_open, there))
        await driver.set_policy(GUEST, NetworkPolicy(listed(ELSEWHERE).egress, upload_kbit_per_second=100_000))
        assert all(map(is_open, there)), "a rate is no matter of what is allowed"
        await driver.set_policy(GUEST, listed("192.0.2.8/29"))
        assert all(map(is_open, there))
        await driver.set_policy(GUEST, listed(INTERNET))
        assert all(map(is_dead, there))
        assert UdpFlow(stage, stack, INTERNET, 5006).say(), "a new one to what is allowed now"
        await driver.set_policy(GUEST, CLOSED)
        assert reached_wrongly(stage) == []
        assert is_open(neighbours)


async def test_a_guest_cannot_fill_the_table_of_connections_that_all_share(stage: Stage) -> None:
    with ExitStack() as stack:
        flow = UdpFlow(stage, stack, INTERNET, 5001)
        assert flow.say()
        for port in range(MAX_FLOWS + 100):
            packet = ipv4(stage.guest.address, ELSEWHERE, UDP, udp(20_000 + port % 10_000, 9, b"one of many"))
            stage.guest.send(stage.to_gateway(packet))
        kept = _flows(stage)
        assert MAX_FLOWS <= kept <= MAX_FLOWS + 20, "refused ones are not kept, and a few are the test's own"
        assert not UdpFlow(stage, stack, INTERNET, 5002).say(3)
        assert is_open(flow), "what is open goes on"
        assert UdpFlow(as_neighbour(stage), stack, INTERNET, 5003).say()
        await stage.lab.driver().ensure_slot_absent(GUEST)
        for _ in range(MAX_FLOWS // 2048 + 1):
            stage.lab.ask("check")
        assert _flows(stage) < 20, "long before the kernel forgets them by itself"


def _flows(stage: Stage) -> int:
    """The kernel remembers, of all guests of the home."""
    return int(stage.lab.in_home("cat", "/proc/sys/net/netfilter/nf_conntrack_count"))


async def test_a_flow_of_a_sandbox_that_is_gone_is_not_its_successors(lab: NetworkLab) -> None:
    lab.start_holder()
    async with AsyncExitStack() as slots:
        stage = await open_stage(lab, slots)
        with ExitStack() as stack:
            flow = UdpFlow(stage, stack, INTERNET, 5001)
            assert flow.say()
            assert is_open(flow)
            await slots.aclose()
            await lab.driver().ensure_slot_absent(GUEST)
            await lab.driver().ensure_slot_absent(NEIGHBOUR)
            successor = await open_stage(lab, slots, CLOSED)
            flow.move_to(successor)
            assert is_dead(flow)


# --- whatever befalls the holder --------------------------------------------------------------------------------------


async def test_a_holder_that_was_killed_is_followed_by_one_that_keeps_the_policies(stage: Stage) -> None:
    lab = stage.lab
    await lab.driver().set_policy(GUEST, listed(INTERNET, *MANY[10:]))
    with ExitStack() as stack:
        flow = TcpFlow(stage, stack, INTERNET, 5001)
        assert is_open(flow)
        before = lab.state()
        assert lab.holder is not None
        lab.holder.kill()
        lab.holder.wait()
        assert reached_wrongly(stage, INTERNET) == [], "nobody is needed to hold the rules"
        lab.start_holder()
        assert counters_left_out(lab.state()) == counters_left_out(before)
        assert reached_wrongly(stage, INTERNET) == []
        assert is_open(flow), "it was opened under the policy that holds still"
        assert not lab.ask("check")["put_back"]


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b'{"policy": {"egress": {"mode": "some"}}, "generation": 1}', b"[" * 9000]
)
async def test_a_slot_whose_policy_is_lost_is_closed_until_it_is_told_anew(stage: Stage, content: bytes | None) -> None:
    lab = stage.lab
    (file,) = [each for each in lab.run.network_policies.iterdir() if GUEST in each.name]
    with ExitStack() as stack:
        flow = UdpFlow(stage, stack, INTERNET, 5001)
        assert flow.say()
        lab.stop_holder()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        lab.start_holder()
        assert is_dead(flow)
        assert reached_wrongly(stage) == []
        assert reached_wrongly(as_neighbour(stage), INTERNET, ELSEWHERE) == []
        await lab.driver().ensure_slot(GUEST, 0, OPEN_POLICY)
        assert is_open(flow)
        assert reached_wrongly(stage, INTERNET, ELSEWHERE) == []


async def test_rules_that_a_stranger_flushed_are_put_back_with_the_policies(stage: Stage) -> None:
    lab = stage.lab
    await lab.driver().set_policy(GUEST, listed(INTERNET))
    with ExitStack() as stack:
        flow, other = UdpFlow(stage, stack, INTERNET, 5001), TcpFlow(as_neighbour(stage), stack, ELSEWHERE, 5002)
        assert flow.say()
        lab.in_home("nft", "flush", "ruleset")
        wait_until(lambda: not lab.ask("check")["put_back"])
        assert reached_wrongly(stage, INTERNET) == []
        assert is_open(flow)
        assert is_open(other)


TAMPERINGS = (
    "delete element inet {table} current {{ {guest} . {mark} }}",
    "add element inet {table} current {{ {guest} . 0x00000001 }}",
    "delete element inet {table} egress {{ {guest} }}",
    "delete element inet {table} egress {{ {guest} }}; add element inet {table} egress {{ {guest} : jump public }}",
    "delete element inet {table} generation {{ {guest} }}",
    "delete element inet {table} refused {{ {guest} }}",
    "add element inet {table} names {{ {guest} . 192.0.2.9 timeout 60s }}",
    "add element inet {table} reachable {{ 169.254.0.0/16 }}",
    "add element inet {table} public_addresses {{ 10.1.0.0/16 }}",
    "flush set inet {table} public_addresses",
    "add rule inet {table} {chain} accept",
    "insert rule inet {table} open drop",
    "flush chain inet {table} {chain}",
    "flush chain inet {table} leaving",
    "add chain inet {table} more",
    "add set inet {table} more {{ type ipv4_addr; }}",
    "add chain inet {table} forward {{ policy drop; }}",
    "add table inet {table} {{ flags dormant; }}",
    "insert rule netdev {table} {tap} accept",
    "delete table inet {table}",
    "delete table netdev {table}",
)


async def test_whatever_a_stranger_changes_is_noticed_and_put_back(stage: Stage) -> None:
    lab = stage.lab
    await lab.driver().set_policy(GUEST, listed(INTERNET))
    wanted = counters_left_out(lab.state())
    (file,) = [each for each in lab.run.network_policies.iterdir() if GUEST in each.name]
    mark = f"{json.loads(file.read_text())['generation']:#010x}"
    tap = f"at{INSTALLATION}{GUEST[:8]}"
    words = {"table": f"atelier_{INSTALLATION}", "guest": stage.guest.address, "mark": mark, "tap": tap}
    words["chain"] = f"{tap}_{mark[2:]}"
    for tampering in TAMPERINGS:
        with holder_asleep(lab):
            lab.in_home("nft", tampering.format(**words))
            assert counters_left_out(lab.state()) != wanted, f"{tampering}: changes nothing"
        wait_until(lambda: counters_left_out(lab.state()) == wanted)
    assert reached_wrongly(stage, INTERNET) == []


async def test_a_strangers_own_rules_are_no_alarm(stage: Stage) -> None:
    await stage.lab.driver().set_policy(GUEST, listed(*MANY, domains=("example.org",)))
    with holder_asleep(stage.lab):
        stage.lab.in_home("nft", "add table inet stranger; add chain inet stranger c; add rule inet stranger c accept")
    assert not stage.lab.ask("check")["put_back"]
    assert "put back" not in stage.lab.log.read_text()


def counters_left_out(state: dict[str, str]) -> dict[str, str]:
    return {name: re.sub(r"packets \d+ bytes \d+|expires \w+", "", text) for name, text in state.items()}
