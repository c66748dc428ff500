"""The bounds of the DNS server: what one guest may take, and that the others do not notice."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

import dns.message
import dns.rcode
import pytest
from tests.unit.resolver_stage import (
    GUEST,
    OTHER,
    PATIENCE_SECONDS,
    Gate,
    ResolverStage,
    addresses,
    listed,
    resolver_stage,
)

from atelier.model.errors import PortInUseError
from atelier.model.network_policy import EgressPolicy
from atelier.network_holder.dns_server import ListeningSockets, ServerLimits
from atelier.network_holder.fair_share import GuestRates, GuestTasks

ONE, TWO, THREE = (IPv4Address(f"10.64.0.{number}") for number in (2, 3, 4))
RECORDS = {"www.example.com.": ["300 A 93.184.215.14"]}
QUESTION = dns.message.make_query("www.example.com", "A").to_wire()


def silent_for(name: str, stage: ResolverStage):
    def answer(asked: dns.message.Message) -> dns.message.Message | None:
        return None if name in str(asked.question[0].name) else stage.nameserver.answer_from_records(asked)

    return answer


@pytest.fixture
async def stage() -> AsyncIterator[ResolverStage]:
    limits = ServerLimits(
        questions_per_second=0.001,
        questions_burst=40,
        questions_at_once=8,
        total_questions_at_once=12,
        streams=2,
        total_streams=3,
        idle_seconds=1.0,
    )
    async with resolver_stage(limits) as made:
        made.gate.policies = {GUEST: EgressPolicy(), OTHER: listed("www.example.com")}
        for nameserver in (made.nameserver, made.second):
            nameserver.records = RECORDS
            nameserver.answer = silent_for("silent", made)
        yield made


async def test_a_guest_that_asks_too_often_is_not_answered_and_others_are(stage: ResolverStage) -> None:
    for _ in range(40):
        assert await stage.send(QUESTION) is not None
    assert await stage.send(QUESTION, seconds=0.3) is None
    reader, writer = await stage.connect()
    writer.write(len(QUESTION).to_bytes(2) + QUESTION)
    assert await reader.read() == b"", "nor over TCP"
    writer.close()
    assert addresses(await stage.ask("www.example.com", guest=OTHER)) == ["93.184.215.14"]


async def test_questions_that_nobody_answers_hold_no_others_up(stage: ResolverStage) -> None:
    """The guest's own place is full, everybody else's is not; and what it may have under way reaches the nameserver,
    nothing beyond."""
    silent = dns.message.make_query("silent.example.net", "A").to_wire()
    asking = [asyncio.create_task(stage.send(silent)) for _ in range(30)]
    while len(stage.nameserver.datagrams) < 8:
        await asyncio.sleep(0.01)
    assert addresses(await stage.ask("www.example.com", guest=OTHER)) == ["93.184.215.14"]
    assert sum(b"silent" in wire for wire in stage.nameserver.datagrams) == 8
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_greedy_guests_lose_their_oldest_question_to_one_that_asks_little(stage: ResolverStage) -> None:
    greedy = ["127.0.9.1", "127.0.9.2", "127.0.9.3"]
    stage.gate.policies |= {guest: EgressPolicy() for guest in greedy}
    silent = dns.message.make_query("silent.example.net", "A").to_wire()
    asking = [asyncio.create_task(stage.send(silent, guest)) for guest in greedy for _ in range(8)]
    while len(stage.nameserver.datagrams) < 12:
        await asyncio.sleep(0.01)
    assert addresses(await stage.ask("www.example.com", guest=OTHER)) == ["93.184.215.14"]
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_a_connection_serves_many_questions(stage: ResolverStage) -> None:
    reader, writer = await stage.connect(OTHER)
    for _ in range(3):
        for byte in len(QUESTION).to_bytes(2) + QUESTION:
            writer.write(bytes([byte]))
            await writer.drain()
        answer = dns.message.from_wire(await reader.readexactly(int.from_bytes(await reader.readexactly(2))))
        assert addresses(answer) == ["93.184.215.14"]
    writer.close()


async def test_connections_are_bounded_for_each_guest_and_for_all(stage: ResolverStage) -> None:
    own = [await stage.connect(GUEST) for _ in range(2)]
    reader, _ = await stage.connect(GUEST)
    assert await reader.read() == b"", "a third of the guest's"
    # All three places are taken now; who has one connection gets it from who has two.
    for guest in (OTHER, "127.0.9.1"):
        stage.gate.policies[guest] = listed("www.example.com")
        answer = await stage.ask("www.example.com", guest=guest, stream=True)
        assert addresses(answer) == ["93.184.215.14"]
    for _, writer in own:
        writer.close()


async def test_an_idle_connection_is_closed(stage: ResolverStage) -> None:
    for sent in (b"", b"\0", b"\1\0half"):
        reader, writer = await stage.connect(GUEST)
        writer.write(sent)
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_with_nonsense_is_told_and_closed(stage: ResolverStage) -> None:
    reader, writer = await stage.connect(GUEST)
    writer.write(b"\0\x0c" + b"\x12\x34\0\0" + bytes(8) + b"\0\3abc")
    answer = await reader.readexactly(14)
    assert answer[:4] == b"\0\x0c\x12\x34"
    assert answer[5] & 0xF == dns.rcode.FORMERR
    assert await reader.read() == b""
    writer.close()


async def test_nonsense_gets_no_answer_and_harms_nobody(stage: ResolverStage) -> None:
    for wire in (b"", b"x", bytes(11), b"\0\0\x80\0" + bytes(8), bytes(4096)):
        await stage.send(wire, seconds=0.05)
    await stage.send(QUESTION + bytes(60000), seconds=0.05)
    assert addresses(await stage.ask("www.example.com")) == ["93.184.215.14"]


async def test_mistakes_are_logged_once_in_a_while(stage: ResolverStage, caplog: pytest.LogCaptureFixture) -> None:
    stage.gate.fails_with = ZeroDivisionError("a mistake")
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            assert await stage.send(QUESTION, OTHER, seconds=0.1) is None
        stage.gate.fails_with = OSError("no descriptors")
        answer = await stage.ask("www.example.com", guest=OTHER)
    assert answer.rcode() == dns.rcode.SERVFAIL
    assert len(caplog.records) == 1
    assert "a mistake in the resolver" in caplog.text
    stage.gate.fails_with = None
    assert addresses(await stage.ask("www.example.com", guest=OTHER)) == ["93.184.215.14"]


def test_a_bucket_fills_again() -> None:
    now = [0.0]
    rates = GuestRates(per_second=10, burst=3, clock=lambda: now[0])
    assert [rates.admit(ONE) for _ in range(5)] == [True, True, True, False, False]
    assert rates.admit(TWO)
    now[0] = 0.1
    assert [rates.admit(ONE) for _ in range(2)] == [True, False]
    now[0] = 1000
    assert [rates.admit(ONE) for _ in range(4)] == [True, True, True, False]


def test_guests_of_long_ago_are_forgotten() -> None:
    now = [0.0]
    rates = GuestRates(per_second=1, burst=10, clock=lambda: now[0])
    for number in range(10_000):
        now[0] += 0.01
        rates.admit(IPv4Address(number))
    assert len(rates._buckets) <= 4096


def test_a_port_that_another_program_has_is_told() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 0))
        with pytest.raises(PortInUseError) as refused:
            ListeningSockets(IPv4Address("127.0.0.53"), other.getsockname()[1])
    assert "another program" in refused.value.message
    assert "ss -lntup" in refused.value.hint


async def test_places_are_shared_out() -> None:
    tasks = GuestTasks(each=3, together=4)
    never = asyncio.Event()

    async def wait() -> None:
        await never.wait()

    first = tasks.start(ONE, wait())
    assert first is not None
    assert all(tasks.start(ONE, wait()) for _ in range(2))
    assert tasks.start(ONE, wait()) is None, "its own places"
    assert tasks.start(TWO, wait())
    assert len(tasks) == 4
    assert tasks.start(TWO, wait()), "from who has three"
    await asyncio.wait([first])
    assert first.cancelled()
    assert tasks.start(TWO, wait()) is None, "all have their share"
    assert tasks.start(THREE, wait())
    assert len(tasks) == 4
    await tasks.close()
    assert len(tasks) == 0


def test_the_gate_of_these_tests_opens_what_is_public() -> None:
    gate = Gate()
    assert gate.open_addresses(ONE, [IPv4Address("10.0.0.1"), IPv4Address("1.1.1.1")], 5) == [IPv4Address("1.1.1.1")]
