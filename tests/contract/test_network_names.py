"""Names and what they open, from a guest's program to the internet and back: with a guest's own network stack, the
holder's resolver, nameservers of the test's own, and listeners on every address that must or must not be reached."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import dns.edns
import dns.rcode
import pytest
from tests.contract.test_network_packets import GUEST, NEIGHBOUR, NO_LAB, holder_asleep
from tests.contract.test_network_packets import lab as lab
from tests.guest_stack import GuestStack, guest_stack
from tests.nameserver import Nameserver
from tests.network_lab import (
    HOST_ADDRESS,
    INSTALLATION,
    INTERNET,
    METADATA,
    NAMESERVER,
    NEIGHBOUR_OF_HOST,
    PRIVATE,
    NetworkLab,
)

from atelier.model.network_policy import OPEN_POLICY, EgressMode, EgressPolicy, NetworkPolicy
from atelier.network_holder.dns_messages import address_question
from atelier.network_holder.resolver import GRACE_SECONDS

pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

OTHER_INTERNET = "203.0.113.10"
PUBLIC_NAMESERVER = "203.0.113.53"
PORT = 443
CLOSED = NetworkPolicy(EgressPolicy.make(EgressMode.NONE))


def listed(*domains: str, networks: tuple[str, ...] = ()) -> NetworkPolicy:
    return NetworkPolicy(EgressPolicy.make(EgressMode.LIST, networks, domains))


LISTED = listed("allowed.example.com", "*.wild.example.org")
RECORDS = {
    "allowed.example.com.": [f"120 A {INTERNET}"],
    "denied.example.com.": [f"120 A {OTHER_INTERNET}"],
    "a.wild.example.org.": ["120 CNAME b.example.net."],
    "b.example.net.": [f"60 A {OTHER_INTERNET}"],
}


class Listener:
    """On all addresses of its namespace; echoes. ``arrivals`` counts connections by the address they came to."""

    def __init__(self) -> None:
        self.arrivals: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def serving(self, inside: contextlib.AbstractContextManager[None]) -> AsyncIterator[None]:
        with inside:
            listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("0.0.0.0", PORT))
        server = await asyncio.start_server(self._serve, sock=listening)
        try:
            yield
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.arrivals[writer.get_extra_info("sockname")[0]] += 1
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(4096):
                writer.write(piece)
                await writer.drain()
        writer.close()


@dataclass
class NamesStage:
    """``upstream`` is the nameserver of the host's; ``public`` is one in the internet that nobody told the host of."""

    lab: NetworkLab
    upstream: Nameserver = field(default_factory=lambda: Nameserver(dict(RECORDS)))
    public: Nameserver = field(default_factory=lambda: Nameserver(dict(RECORDS)))
    internet: Listener = field(default_factory=Listener)
    host: Listener = field(default_factory=Listener)

    async def open(self, stack: AsyncExitStack) -> None:
        for address in (OTHER_INTERNET, PUBLIC_NAMESERVER):
            self.lab.in_internet("ip", "address", "add", f"{address}/32", "dev", "lo")
        for nameserver, address in ((self.upstream, NAMESERVER), (self.public, PUBLIC_NAMESERVER)):
            await stack.enter_async_context(nameserver.serving(address, 53, self.lab.inside("internet")))
        await stack.enter_async_context(self.internet.serving(self.lab.inside("internet")))
        await stack.enter_async_context(self.host.serving(self.lab.inside("host")))

    def heard_anything(self) -> bool:
        return bool(self.upstream.heard or self.public.heard or self.internet.arrivals or self.host.arrivals)


@pytest.fixture
async def stage(lab: NetworkLab) -> AsyncIterator[NamesStage]:
    async with AsyncExitStack() as stack:
        made = NamesStage(lab)
        await made.open(stack)
        lab.start_holder()
        yield made


async def echoes(connection: socket.socket, content: bytes, seconds: float = 10.0) -> bool:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, content)
    try:
        async with asyncio.timeout(seconds):
            return await loop.sock_recv(connection, 4096) == content
    except (TimeoutError, OSError):
        return False


@pytest.fixture
async def guest(stage: NamesStage) -> AsyncIterator[GuestStack]:
    async with guest_stack(stage.lab, GUEST, 0, LISTED) as made:
        yield made


async def test_an_allowed_name_opens_its_address_and_no_other(stage: NamesStage, guest: GuestStack) -> None:
    assert not await guest.reaches(INTERNET, PORT), "closed before the name was asked for"
    assert not stage.heard_anything()
    assert await guest.addresses_of("allowed.example.com") == [INTERNET]
    with await guest.connect(INTERNET, PORT) as connection:
        assert await echoes(connection, b"hello")
    assert not await guest.reaches(OTHER_INTERNET, PORT)
    assert stage.internet.arrivals == {INTERNET: 1}
    (asked,) = stage.upstream.datagrams
    assert asked[2:] == address_question("allowed.example.com")[2:]


async def test_a_chain_of_aliases_opens_what_stands_at_its_end(stage: NamesStage, guest: GuestStack) -> None:
    assert await guest.addresses_of("a.wild.example.org") == [OTHER_INTERNET]
    assert await guest.reaches(OTHER_INTERNET, PORT)
    assert not await guest.reaches(INTERNET, PORT)


async def test_what_one_guest_opened_is_closed_to_another(stage: NamesStage, guest: GuestStack) -> None:
    async with guest_stack(stage.lab, NEIGHBOUR, 1, LISTED) as neighbour:
        await guest.addresses_of("allowed.example.com")
        assert not await neighbour.reaches(INTERNET, PORT)
        assert await guest.reaches(INTERNET, PORT)


@pytest.mark.parametrize("stream", [False, True], ids=["udp", "tcp"])
async def test_a_denied_name_is_refused_and_nobody_hears_of_it(
    stage: NamesStage, guest: GuestStack, stream: bool
) -> None:
    for name in ("denied.example.com", "stolen-data.allowed.example.com", "stolen.attacker.net"):
        for kind in ("A", "TXT", "NULL"):
            answer = await guest.ask(name, kind, stream=stream)
            assert answer.rcode() == dns.rcode.REFUSED
            assert [option.otype for option in answer.options] == [dns.edns.OptionType.EDE]
    for kind in ("TXT", "NULL", "AAAA", "HTTPS"):
        answer = await guest.ask("allowed.example.com", kind, stream=stream)
        assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
    assert not await guest.reaches(OTHER_INTERNET, PORT)
    assert not stage.heard_anything()
    assert (await guest.ask("allowed.example.com", stream=stream)).answer, "an allowed one is answered"


async def test_another_nameserver_than_the_gateway_is_closed_by_a_list(stage: NamesStage, guest: GuestStack) -> None:
    async with guest_stack(stage.lab, NEIGHBOUR, 1, OPEN_POLICY) as neighbour:
        asked = (
            guest.ask("allowed.example.com", server=server, stream=stream, seconds=1.5)
            for server in (PUBLIC_NAMESERVER, NAMESERVER)
            for stream in (False, True)
        )
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [TimeoutError] * 4
        assert not stage.heard_anything()
        for stream in (False, True):
            answer = await neighbour.ask("allowed.example.com", server=PUBLIC_NAMESERVER, stream=stream)
            assert answer.answer, "who may reach the whole internet reaches it"


async def test_the_whole_internet_needs_no_names(stage: NamesStage) -> None:
    async with guest_stack(stage.lab, GUEST, 0, OPEN_POLICY) as guest:
        assert await guest.reaches(OTHER_INTERNET, PORT)
        for stream in (False, True):
            assert (await guest.ask("denied.example.com", stream=stream)).answer
        assert (len(stage.upstream.datagrams), len(stage.upstream.streams)) == (1, 1)


async def test_a_name_that_points_inside_opens_nothing(stage: NamesStage, guest: GuestStack) -> None:
    """DNS rebinding: the name is allowed, and its owner is not to be trusted."""
    plan = stage.lab.plan
    ways = (plan.gateway, plan.uplink_host, plan.uplink_home, plan.address_of(1))
    inside = [*PRIVATE, METADATA, HOST_ADDRESS, NEIGHBOUR_OF_HOST, *map(str, ways)]
    for number, address in enumerate([*inside, "127.0.0.1", "0.0.0.0", "255.255.255.255"]):
        stage.upstream.records[f"n{number}.wild.example.org."] = [f"120 A {address}"]
        answer = await guest.ask(f"n{number}.wild.example.org")
        assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, []), address
        assert [option.otype for option in answer.options] == [dns.edns.OptionType.EDE]
    assert not any(await asyncio.gather(*(guest.reaches(address, PORT) for address in inside)))
    assert not stage.internet.arrivals and not stage.host.arrivals
    assert "timeout" not in stage.lab.in_home("nft", "list", "set", "inet", f"atelier_{INSTALLATION}", "names").replace(
        "flags timeout", ""
    )


async def test_a_private_network_that_is_listed_is_reached_by_name_too(stage: NamesStage) -> None:
    stage.upstream.records["allowed.example.com."] = [f"120 A {PRIVATE[0]}", f"120 A {PRIVATE[1]}"]
    policy = listed("allowed.example.com", networks=(f"{PRIVATE[0]}/32",))
    async with guest_stack(stage.lab, GUEST, 0, policy) as guest:
        assert await guest.addresses_of("allowed.example.com") == [PRIVATE[0]]
        assert await guest.reaches(PRIVATE[0], PORT)
        assert not await guest.reaches(PRIVATE[1], PORT)


async def test_a_forged_server_name_gains_nothing(stage: NamesStage, guest: GuestStack) -> None:
    """A connection to another address that names the allowed host, in TLS's first message or HTTP's Host, is none: it is
    judged by its address."""
    await guest.addresses_of("allowed.example.com")
    assert not await guest.reaches(OTHER_INTERNET, PORT)
    assert stage.internet.arrivals == {}
    with await guest.connect(INTERNET, PORT) as connection:
        assert await echoes(connection, b"Host: allowed.example.com")


async def test_when_an_answer_has_run_out_open_flows_go_on_and_new_ones_do_not(
    stage: NamesStage, guest: GuestStack
) -> None:
    await guest.addresses_of("allowed.example.com")
    with await guest.connect(INTERNET, PORT) as connection:
        names = stage.lab.in_home("nft", "list", "set", "inet", f"atelier_{INSTALLATION}", "names")
        assert f"{guest.address} . {INTERNET}" in names
        assert f"timeout {(120 + GRACE_SECONDS) // 60}m{(120 + GRACE_SECONDS) % 60}s" in names
        # The kernel's own end of it, sooner.
        element = f"element inet atelier_{INSTALLATION} names {{ {guest.address} . {INTERNET}"
        with holder_asleep(stage.lab):
            stage.lab.in_home("nft", f"delete {element} }}; add {element} timeout 1s }}")
            await asyncio.sleep(1.5)
            assert not await guest.reaches(INTERNET, PORT)
            assert await echoes(connection, b"still here")
    assert stage.internet.arrivals == {INTERNET: 1}


async def test_a_policy_that_closes_revokes_what_names_opened(stage: NamesStage, guest: GuestStack) -> None:
    await guest.addresses_of("allowed.example.com")
    with await guest.connect(INTERNET, PORT) as connection:
        assert await echoes(connection, b"before")
        await stage.lab.driver().set_policy(GUEST, CLOSED)
        passed = await asyncio.gather(echoes(connection, b"after", seconds=1.5), guest.reaches(INTERNET, PORT))
        assert passed == [False, False]
        assert (await guest.ask("allowed.example.com")).rcode() == dns.rcode.REFUSED
    assert stage.internet.arrivals == {INTERNET: 1}
    await stage.lab.driver().set_policy(GUEST, LISTED)
    assert not await guest.reaches(INTERNET, PORT), "what was opened before is forgotten"
    assert await guest.addresses_of("allowed.example.com") == [INTERNET]
    assert await guest.reaches(INTERNET, PORT)


async def test_names_are_answered_after_the_holder_and_the_rules_came_anew(
    stage: NamesStage, guest: GuestStack
) -> None:
    await guest.addresses_of("allowed.example.com")
    stage.lab.stop_holder()
    assert await guest.reaches(INTERNET, PORT), "what a name opened stays open without a holder"
    stage.lab.start_holder()
    assert await guest.reaches(INTERNET, PORT)
    assert await guest.addresses_of("allowed.example.com") == [INTERNET]
    assert (await guest.ask("denied.example.com")).rcode() == dns.rcode.REFUSED
    stage.lab.in_home("nft", "flush", "ruleset")
    while stage.lab.ask("check")["put_back"]:
        await asyncio.sleep(0.05)
    assert await guest.addresses_of("allowed.example.com") == [INTERNET]
    assert await guest.reaches(INTERNET, PORT)
    # Its address goes, as when somebody makes the bridge anew, and comes back.
    plan = stage.lab.plan
    gateway = f"{plan.gateway}/{plan.subnet.prefixlen}"
    stage.lab.in_home("ip", "address", "delete", gateway, "dev", "br0")
    stage.lab.in_home("ip", "address", "add", gateway, "dev", "br0")
    for stream in (False, True):
        assert (await guest.ask("allowed.example.com", stream=stream)).answer


async def test_a_nameserver_on_the_hosts_loopback_is_asked_and_changes_are_followed(
    stage: NamesStage, guest: GuestStack
) -> None:
    """As systemd-resolved has it. No packet of a guest's could go there."""
    local = Nameserver({"allowed.example.com.": [f"120 A {OTHER_INTERNET}"]})
    async with local.serving("127.0.0.53", 53, stage.lab.inside("host")):
        assert await guest.addresses_of("allowed.example.com") == [INTERNET]
        stage.lab.set_nameservers("127.0.0.53")
        assert await guest.addresses_of("allowed.example.com") == [OTHER_INTERNET]
        assert (len(stage.upstream.heard), len(local.heard)) == (1, 1)


async def test_without_a_nameserver_guests_are_told(stage: NamesStage, guest: GuestStack) -> None:
    stage.lab.set_nameservers("127.0.0.99")
    assert (await guest.ask("allowed.example.com")).rcode() == dns.rcode.SERVFAIL
    stage.lab.set_nameservers("127.0.0.99", NAMESERVER)
    assert await guest.addresses_of("allowed.example.com") == [INTERNET]


async def test_who_floods_the_resolver_does_not_silence_another(stage: NamesStage, guest: GuestStack) -> None:
    """While the holder is busy (here: asleep) questions wait in one queue."""
    await guest.addresses_of("allowed.example.com")
    async with guest_stack(stage.lab, NEIGHBOUR, 1, LISTED) as neighbour:
        with neighbour.socket(socket.SOCK_DGRAM) as flooding:
            flooding.connect((neighbour.gateway, 53))
            with holder_asleep(stage.lab):
                for _ in range(1000):
                    for _ in range(20):
                        flooding.send(bytes(64))
                    # The guest's card is emptied by this loop too.
                    await asyncio.sleep(0)
                asking = asyncio.create_task(guest.ask("allowed.example.com"))
                await asyncio.sleep(0.1)
            assert (await asking).answer


@pytest.mark.parametrize("stream", [False, True], ids=["udp", "tcp"])
async def test_who_asks_without_end_is_bounded_and_others_are_answered(
    stage: NamesStage, guest: GuestStack, stream: bool
) -> None:
    async with guest_stack(stage.lab, NEIGHBOUR, 1, LISTED) as neighbour:
        asked = 0

        async def ask_on() -> None:
            nonlocal asked
            while True:
                with contextlib.suppress(TimeoutError, OSError, EOFError):
                    asked += 1
                    await neighbour.ask("allowed.example.com", stream=stream, seconds=0.2)

        asking = [asyncio.create_task(ask_on()) for _ in range(50)]
        while asked < 500:
            await asyncio.sleep(0.05)
        for _ in range(20):
            assert (await guest.ask("allowed.example.com", stream=stream)).answer
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
