"""What a slot is beside what it reaches: addresses that names open to it, its rates and counters, and that nothing of it
stays behind. With real packets, in namespaces of the test's own.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from tests import network_frames as frames
from tests.contract.packet_flows import TcpFlow, UdpFlow, as_neighbour, is_dead, is_open, reached_wrongly
from tests.contract.packet_stage import Guest, PacketEar, Stage
from tests.contract.test_network_packets import GUEST, NEIGHBOUR, NO_LAB, holder_asleep, open_stage, wait_until
from tests.network_frames import ethernet, icmp_error, ipv4, udp
from tests.network_lab import (
    BRIDGE,
    ELSEWHERE,
    HOST_ADDRESS,
    INSTALLATION,
    INTERNET,
    METADATA,
    NEIGHBOUR_OF_HOST,
    PRIVATE,
    NetworkLab,
    network_lab,
)

from atelier.host.flow_table import FlowTable
from atelier.host.netlink import RouteSocket
from atelier.host.nftables import Nftables
from atelier.model.errors import HostError, NotFoundError
from atelier.model.network_policy import MAX_ENTRIES, OPEN_POLICY, EgressMode, EgressPolicy, NetworkPolicy
from atelier.network_holder.kept_rules import KeptRules
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.policies import PolicyFiles
from atelier.network_holder.rules import Surroundings
from atelier.network_holder.slots import NetworkSlots

pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

NAMES = NetworkNames(INSTALLATION, BRIDGE)
TABLE = NAMES.table


def arrives(ear: PacketEar | Guest, mark: bytes, within: float) -> bool:
    deadline = time.monotonic() + within
    while not any(mark in frame for frame in ear.receive()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def listed(*networks: str, domains: tuple[str, ...] = ()) -> NetworkPolicy:
    return NetworkPolicy(EgressPolicy.make(EgressMode.LIST, networks, domains))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[NetworkLab]:
    with network_lab(tmp_path) as made:
        yield made


@pytest.fixture
async def stage(lab: NetworkLab) -> AsyncIterator[Stage]:
    lab.start_holder()
    async with AsyncExitStack() as stack:
        yield await open_stage(lab, stack)


# --- addresses that names open ----------------------------------------------------------------------------------------


@contextmanager
def own_slots(lab: NetworkLab) -> Iterator[tuple[NetworkSlots, KeptRules]]:
    """This process in the holder's place, as long as that one is stopped."""
    lab.stop_holder()
    with lab.inside("home"), ExitStack() as stack:
        links, nftables, flows = RouteSocket(), Nftables(), FlowTable()
        for each in (links, nftables, flows):
            stack.callback(each.close)
        rules = KeptRules(NAMES, nftables, lambda: {name for name in links.links() if NAMES.is_tap(name)})
        slots = NetworkSlots(NAMES, links, rules, flows, PolicyFiles(lab.run.network_policies))
        slots.adopt()
        slots.open(lab.plan)
        own, connected = frozenset({IPv4Network(HOST_ADDRESS)}), frozenset({IPv4Network("198.51.100.0/24")})
        rules.load(Surroundings(lab.plan, NAMES.uplink_home, own, connected), slots.described())
        yield slots, rules


def open_for(slots: NetworkSlots, stage: Stage, seconds: int, *addresses: str) -> list[str]:
    opened = slots.open_addresses(IPv4Address(stage.guest.address), [IPv4Address(each) for each in addresses], seconds)
    return [str(address) for address in opened]


async def test_a_name_opens_what_is_public_and_no_more_to_one_guest_for_a_while(stage: Stage) -> None:
    policy = listed(PRIVATE[0], domains=("example.org",))
    for sandbox in (GUEST, NEIGHBOUR):
        await stage.lab.driver().set_policy(sandbox, policy)
    wanted = [ELSEWHERE, PRIVATE[0], PRIVATE[1], METADATA, HOST_ADDRESS, NEIGHBOUR_OF_HOST, stage.guest.gateway]
    with own_slots(stage.lab) as (slots, rules), ExitStack() as stack:
        assert open_for(slots, stage, 5, *wanted) == [ELSEWHERE, PRIVATE[0]]
        flows = [make(stage, stack, ELSEWHERE, port) for make, port in ((UdpFlow, 5001), (TcpFlow, 5002))]
        assert all(flow.say() and is_open(flow) for flow in flows)
        assert reached_wrongly(as_neighbour(stage), PRIVATE[0]) == [], "it was opened to the guest alone"
        wait_until(lambda: reached_wrongly(stage, PRIVATE[0]) == [], 20)
        assert all(map(is_open, flows)), "time closes new flows only"
        assert rules.is_intact()


async def test_an_opened_address_is_opened_longer_and_closed_with_its_domain(stage: Stage) -> None:
    lab = stage.lab
    await lab.driver().set_policy(GUEST, listed(domains=("example.org",)))
    with own_slots(lab) as (slots, rules), ExitStack() as stack:
        assert open_for(slots, stage, 1, ELSEWHERE) == [ELSEWHERE]
        assert open_for(slots, stage, 600, ELSEWHERE, INTERNET) == [ELSEWHERE, INTERNET]
        assert open_for(slots, stage, 5, ELSEWHERE) == [ELSEWHERE], "never for a shorter time than was said"
        time.sleep(1.2)
        assert reached_wrongly(stage, ELSEWHERE, INTERNET) == []
        flow = TcpFlow(stage, stack, ELSEWHERE, 5001)
        await slots.set_policy(GUEST, listed(domains=("example.org", "example.com")))
        assert is_open(flow), "no domain was taken back"
        assert reached_wrongly(stage, ELSEWHERE, INTERNET) == []
        lab.in_home("nft", "flush", "ruleset")
        assert not rules.is_intact()
        rules.load(rules.around, slots.described())
        assert rules.is_intact()
        assert reached_wrongly(stage, ELSEWHERE, INTERNET) == [], "they stay open when rules are put back"
        assert is_open(flow)
        await slots.set_policy(GUEST, listed(domains=("example.com",)))
        assert is_dead(flow)
        assert reached_wrongly(stage) == []
        assert rules.is_intact()


async def test_a_holder_finds_what_its_predecessor_had_opened(stage: Stage) -> None:
    lab = stage.lab
    await lab.driver().set_policy(GUEST, listed(domains=("example.org",)))
    with own_slots(lab) as (slots, _):
        open_for(slots, stage, 600, ELSEWHERE)
    lab.start_holder()
    assert reached_wrongly(stage, ELSEWHERE) == []
    assert not lab.ask("check")["put_back"]
    lab.in_home("nft", "flush", "ruleset")
    wait_until(lambda: not lab.ask("check")["put_back"])
    assert reached_wrongly(stage, ELSEWHERE) == []
    seconds = re.search(rf"{ELSEWHERE} timeout \w+ expires (\d+)m\w+", lab.in_home("nft", "list", "ruleset"))
    assert seconds is not None, "not for longer than was said"
    assert int(seconds[1]) < 10
    # Of another policy than the one in the file: told between its file and its rules, the predecessor ended.
    lab.stop_holder()
    (file,) = [each for each in lab.run.network_policies.iterdir() if GUEST in each.name]
    file.write_text(json.dumps({**json.loads(file.read_text()), "generation": 7}))
    lab.start_holder()
    assert reached_wrongly(stage) == []


async def test_names_open_so_many_addresses_and_no_more(stage: Stage) -> None:
    await stage.lab.driver().set_policy(GUEST, listed(domains=("*.example.org",)))
    with own_slots(stage.lab) as (slots, rules):
        for first in range(0, 1100, 50):
            found = open_for(slots, stage, 600, *(f"20.0.{n >> 8}.{n & 255}" for n in range(first, first + 50)))
            assert len(found) == min(50, max(0, 1024 - first))
        assert rules.is_intact()


async def test_every_rule_of_a_policys_own_chain_is_needed(stage: Stage) -> None:
    lab, guest = stage.lab, stage.guest.address
    await lab.driver().set_policy(GUEST, listed(INTERNET, PRIVATE[0], domains=("example.org",)))

    def rules() -> list[str]:
        listing = lab.in_home("nft", "--handle", "list", "table", "inet", TABLE)
        chain = re.search(rf"chain ({NAMES.tap(GUEST)}_\w+) .*?\}}", listing, re.DOTALL)
        assert chain is not None
        return [f"{chain[1]} handle {handle}" for handle in re.findall(r"goto open # handle (\d+)", chain[0])]

    def reached() -> list[str]:
        lab.in_home("nft", f"add element inet {TABLE} names {{ {guest} . {ELSEWHERE} timeout 60s }}")
        return reached_wrongly(stage, INTERNET, PRIVATE[0], ELSEWHERE)

    with holder_asleep(lab):
        assert reached() == []
    for number in range(3):
        wait_until(lambda: not lab.ask("check")["put_back"])
        with holder_asleep(lab):
            lab.in_home("nft", f"delete rule inet {TABLE} {rules()[number]}")
            assert reached()
    # An address that names have opened, and that is not public any more.
    wait_until(lambda: not lab.ask("check")["put_back"])
    with holder_asleep(lab):
        lab.in_home("nft", f"flush set inet {TABLE} public_addresses")
        assert reached() == [f"{what} to {ELSEWHERE}: not heard at internet" for what in ("UDP", "TCP", "ping")]


# --- tricks -----------------------------------------------------------------------------------------------------------


async def test_a_forged_icmp_error_is_no_tunnel(stage: Stage) -> None:
    """It quotes an allowed flow of the guest's own, or of its neighbour's, and is for somebody else."""
    lab = stage.lab
    await lab.driver().set_policy(GUEST, listed(INTERNET))
    with ExitStack() as stack:
        flow, other = UdpFlow(stage, stack, INTERNET, 5001), UdpFlow(as_neighbour(stage), stack, ELSEWHERE, 5002)
        assert flow.say()
        assert other.say()
        assert flow.push()
        assert other.push()
        ear = stage.ears["internet"]

        def heard(server: str, owner: str, port: int, destination: str, within: float = 0.05) -> bool:
            stage.number += 1
            quoted = ipv4(server, owner, frames.UDP, udp(port, port, stage.mark))
            packet = ipv4(stage.guest.address, destination, frames.ICMP, icmp_error(3, 3, quoted))
            ear.receive()
            stage.guest.send(stage.to_gateway(packet))
            return arrives(ear, stage.mark, within)

        assert heard(INTERNET, stage.guest.address, 5001, INTERNET, within=30), "a true one passes"
        assert not heard(INTERNET, stage.guest.address, 5001, ELSEWHERE)
        assert not heard(INTERNET, stage.guest.address, 5001, METADATA)
        assert not heard(ELSEWHERE, stage.neighbour.address, 5002, ELSEWHERE)
        assert not heard(ELSEWHERE, stage.neighbour.address, 5002, INTERNET)
        assert is_open(other), "nor does it disturb the neighbour"


async def test_nothing_new_comes_in_under_a_guests_name(stage: Stage) -> None:
    """From the host's side, as another guest whose policy opens the network that guests are in."""
    lab = stage.lab
    await lab.driver().set_policy(NEIGHBOUR, listed("10.0.0.0/8", "100.64.0.0/10"))
    with lab.inside("host"), ExitStack() as stack:
        ear = PacketEar(NAMES.uplink_host)
        stack.callback(ear.close)
        mac = json.loads(lab.in_home("ip", "-j", "link", "show", NAMES.uplink_home))[0]["address"]

        def heard(within: float = 0.05) -> bool:
            stage.number += 1
            stage.guest.receive()
            content = udp(9, 9, stage.mark)
            packet = ipv4(stage.neighbour.address, stage.guest.address, frames.UDP, content)
            ear.send(ethernet(mac, "02:00:00:00:00:09", frames.IPV4, packet))
            return arrives(stage.guest, stage.mark, within)

        assert not heard()
        with holder_asleep(lab):
            rules = json.loads(lab.in_home("nft", "-j", "list", "chain", "inet", TABLE, "forward"))["nftables"]
            (rule,) = [each["rule"] for each in rules if "established" in json.dumps(each)]
            rule["expr"] = [each for each in rule["expr"] if "established" not in json.dumps(each)]
            lab.in_home("nft", "-j", json.dumps({"nftables": [{"replace": {"rule": rule}}]}))
            assert heard(within=30), "without the condition it would"


# --- rates and counters -----------------------------------------------------------------------------------------------

RATE_KBIT = 1600
BYTES_PER_SECOND = RATE_KBIT * 125
PAYLOAD_BYTES = 1000
SECONDS = 2.0
_RECEIVE_BUFFER_FORCE = 33
"""Source: asm-generic/socket.h, SO_RCVBUFFORCE."""


@dataclass
class Passage:
    """Three times of what the rate lets pass was sent, within ``seconds``."""

    sent: int
    heard: int
    seconds: float

    def is_free(self) -> bool:
        return self.heard > 0.95 * self.sent

    def is_limited(self, bucket_bytes: int) -> bool:
        allowed = BYTES_PER_SECOND * self.seconds
        assert self.sent > allowed + bucket_bytes, "this machine is too slow to send more than is allowed"
        return 0.6 * allowed < self.heard < allowed + bucket_bytes


def measure(send: Callable[[], object], read: Callable[[], int]) -> Passage:
    """``read`` returns the bytes of payload that have come since it was called last."""
    count = int(3 * BYTES_PER_SECOND * SECONDS / PAYLOAD_BYTES)
    heard = 0
    begun = time.monotonic()
    for number in range(count):
        send()
        if number % 20 == 0:
            heard += read()
            time.sleep(max(0.0, begun + SECONDS * number / count - time.monotonic()))
    seconds = time.monotonic() - begun
    time.sleep(0.3)
    return Passage(count * PAYLOAD_BYTES, heard + read(), seconds + 0.3)


def both_ways(stage: Stage, stack: ExitStack) -> tuple[Callable[[], Passage], Callable[[], Passage]]:
    """(what passes from the guest to a server in the internet, what passes back)."""
    with stage.lab.inside("internet"):
        server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.setsockopt(socket.SOL_SOCKET, _RECEIVE_BUFFER_FORCE, 1 << 23)
    server.bind((INTERNET, 7777))
    server.setblocking(False)
    payload = bytes(PAYLOAD_BYTES)
    packet = ipv4(stage.guest.address, INTERNET, frames.UDP, udp(7777, 7777, payload))
    stage.guest.send(stage.to_gateway(packet))
    wait_until(lambda: bool(select.select([server], [], [], 0)[0]))
    _, peer = server.recvfrom(65536)

    def server_reads() -> int:
        heard = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                heard += len(server.recv(65536))
        return heard

    def guest_reads() -> int:
        return sum(PAYLOAD_BYTES for frame in stage.guest.receive() if payload in frame)

    return (
        lambda: measure(lambda: stage.guest.send(stage.to_gateway(packet)), server_reads),
        lambda: measure(lambda: server.sendto(payload, peer), guest_reads),
    )


async def test_a_rate_of_sending_limits_and_is_changed_live(stage: Stage) -> None:
    driver = stage.lab.driver()
    bucket = BYTES_PER_SECOND + 65536
    with ExitStack() as stack:
        up, down = both_ways(stage, stack)
        await driver.set_policy(GUEST, NetworkPolicy(upload_kbit_per_second=RATE_KBIT))
        assert up().is_limited(bucket)
        assert down().is_free()
        await driver.set_policy(GUEST, NetworkPolicy(upload_kbit_per_second=RATE_KBIT * 10))
        assert up().is_free()
        assert not stage.lab.ask("check")["put_back"]
        await driver.set_policy(GUEST, OPEN_POLICY)
        assert up().is_free()
    assert "limit" not in stage.lab.in_home("nft", "list", "table", "netdev", TABLE)


async def test_a_rate_of_receiving_limits_and_is_changed_live(stage: Stage) -> None:
    driver = stage.lab.driver()
    with ExitStack() as stack:
        up, down = both_ways(stage, stack)
        await driver.set_policy(GUEST, NetworkPolicy(download_kbit_per_second=RATE_KBIT))
        assert down().is_limited(bucket_bytes=65536)
        assert up().is_free()
        stage.lab.stop_holder()
        stage.lab.start_holder()
        assert down().is_limited(bucket_bytes=65536)
        await driver.set_policy(GUEST, NetworkPolicy(download_kbit_per_second=RATE_KBIT * 10))
        assert down().is_free()
        await driver.set_policy(GUEST, OPEN_POLICY)
        assert down().is_free()
    assert "tbf" not in stage.lab.in_home("tc", "qdisc")


async def test_without_tc_a_rate_of_receiving_is_refused_in_words(lab: NetworkLab) -> None:
    folder = lab.folder / "programs"
    folder.mkdir()
    for program in ("ip", "nft"):
        (folder / program).symlink_to(str(shutil.which(program)))
    lab.start_holder(environment={"PATH": str(folder)})
    driver = lab.driver()
    await driver.ensure_slot(GUEST, 0)
    with pytest.raises(HostError, match="tc is not installed") as refused:
        await driver.set_policy(GUEST, NetworkPolicy(EgressPolicy(EgressMode.NONE), download_kbit_per_second=1000))
    assert "iproute2" in refused.value.hint
    assert json.loads(next(lab.run.network_policies.iterdir()).read_text())["policy"] == OPEN_POLICY.to_json()


async def test_usage_counts_what_was_sent_received_and_refused(stage: Stage) -> None:
    lab, driver = stage.lab, stage.lab.driver()
    with ExitStack() as stack:
        flow = UdpFlow(stage, stack, INTERNET, 5001)
        assert flow.say()
        before = await driver.read_usage()
        assert before.keys() == {GUEST, NEIGHBOUR}
        for _ in range(20):
            stage.guest.send(stage.to_gateway(stage.udp_to(PRIVATE[0])))
            assert flow.push()
        for _ in range(10):
            assert flow.say()
        after = await driver.read_usage()
    was, now = before[GUEST], after[GUEST]
    # A few more are ARP's.
    assert 30 <= now.sent_packets - was.sent_packets < 40
    assert 20 <= now.received_packets - was.received_packets < 30
    assert 30 * 42 <= now.sent_bytes - was.sent_bytes < 40 * 80
    assert 20 * 42 <= now.received_bytes - was.received_bytes < 30 * 80
    assert now.refused_packets == was.refused_packets + 20
    assert after[NEIGHBOUR].refused_packets == before[NEIGHBOUR].refused_packets
    lab.in_home("nft", "flush", "chain", "inet", TABLE, "public")
    wait_until(lambda: not lab.ask("check")["put_back"])
    assert (await driver.read_usage())[GUEST].refused_packets == now.refused_packets, "carried over a reload"
    lab.stop_holder()
    lab.start_holder()
    assert (await driver.read_usage())[GUEST].refused_packets == now.refused_packets, "carried over a new holder"
    await driver.ensure_slot_absent(GUEST)
    assert (await driver.read_usage()).keys() == {NEIGHBOUR}


# --- what is asked, and what is left ----------------------------------------------------------------------------------


async def test_policies_leave_nothing_behind(lab: NetworkLab) -> None:
    lab.start_holder()
    driver = lab.driver()
    ids = [re.sub("[01]", lambda digit: "xy"[int(digit[0])], f"{number:08b}") + "aaaa" for number in range(200)]
    many = [f"20.{number}.0.0/25" for number in range(30)]
    policies = (
        listed(INTERNET, domains=("example.org",)),
        NetworkPolicy(listed(*many).egress, None, 1000),
        NetworkPolicy(EgressPolicy.make(EgressMode.ALL, ["10.0.0.0/8"]), 1000, 1000),
        NetworkPolicy(EgressPolicy(EgressMode.NONE)),
    )
    before = lab.state()
    for number, sandbox in enumerate(ids):
        await driver.ensure_slot(sandbox, number, policies[number % 4])
        await driver.set_policy(sandbox, policies[(number + 1) % 4])
    assert not lab.ask("check")["put_back"]
    assert len(list(lab.run.network_policies.iterdir())) == 200
    for sandbox in ids:
        await driver.ensure_slot_absent(sandbox)
    assert lab.state() == before
    assert list(lab.run.network_policies.iterdir()) == []
    assert lab.ask("close")["ok"]
    assert not lab.run.network_policies.exists()


async def test_a_policy_needs_a_slot(lab: NetworkLab) -> None:
    lab.start_holder()
    with pytest.raises(NotFoundError) as refused:
        await lab.driver().set_policy(GUEST, OPEN_POLICY)
    assert refused.value.code == "no_network_slot"
    assert await lab.driver().read_usage() == {}


async def test_the_largest_policy_passes_and_a_larger_request_does_not(lab: NetworkLab) -> None:
    lab.start_holder()
    label = "x" * 61
    domains = tuple(f"*.{number:05d}.{label}.{label}.{label}.{'y' * 59}" for number in range(MAX_ENTRIES))
    assert {len(domain) for domain in domains} == {253}
    await lab.driver().ensure_slot(GUEST, 0, listed(domains=domains))
    networks = tuple(f"20.{number >> 8}.{number & 255}.0/25" for number in range(MAX_ENTRIES))
    await lab.driver().set_policy(GUEST, listed(*networks))
    assert not lab.ask("check")["put_back"]
    answer = lab.ask("set_policy", sandbox_id=GUEST, policy=OPEN_POLICY.to_json(), more="x" * (600 * 1024))
    assert answer["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ("missing", "invalid_request"),
        (None, "invalid_network_policy"),
        ([], "invalid_network_policy"),
        ({}, "invalid_network_policy"),
        ({"egress": {"mode": "some"}}, "invalid_network_policy"),
        ({"egress": {"mode": "list", "networks": "10.0.0.0/8"}}, "invalid_network_policy"),
        ({"egress": {"mode": "list", "networks": ["10.0.0.1/8"]}}, "invalid_network"),
        ({"egress": {"mode": "list", "networks": ["1.2.3.4 } ; flush ruleset"]}}, "invalid_network"),
        ({"egress": {"mode": "list", "networks": ["169.254.169.254"]}}, "invalid_network"),
        ({"egress": {"mode": "list", "domains": ["*"]}}, "invalid_domain"),
        ({"egress": {"mode": "none", "networks": ["1.2.3.4"]}}, "invalid_egress_policy"),
        ({"egress": {"mode": "all"}, "upload_kbit_per_second": 1}, "invalid_network_rate"),
        ({"egress": {"mode": "all"}, "upload_kbit_per_second": "1000"}, "invalid_network_policy"),
        ({"egress": {"mode": "all"}, "download_kbit_per_second": True}, "invalid_network_policy"),
    ],
)
async def test_a_policy_that_is_none_changes_nothing(lab_of_requests: NetworkLab, policy: object, code: str) -> None:
    lab = lab_of_requests
    await lab.driver().ensure_slot(GUEST, 0)
    before = lab.state()
    words = {} if policy == "missing" else {"policy": policy}
    for operation in ("set_policy", "ensure_slot"):
        answer = lab.ask(operation, sandbox_id=GUEST, lease=0, mac_address="02:00:00:00:00:01", **words)
        assert (answer["ok"], answer["code"]) == (False, code)
        assert answer["message"]
    assert lab.state() == before


@pytest.fixture(scope="module")
def lab_of_requests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkLab]:
    with network_lab(tmp_path_factory.mktemp("network")) as made:
        made.start_holder()
        yield made
