"""How nameservers are asked: who is asked when, and whose answer counts."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import AsyncExitStack
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import dns.message
import dns.rcode
import dns.rrset
import pytest
from tests.nameserver import Nameserver
from tests.unit.resolver_stage import addresses, listed, make_socket, resolver_stage

from atelier.host.nameservers import NameserverFile
from atelier.network_holder.dns_messages import address_question
from atelier.network_holder.dns_upstream import NoAnswerError, Upstream

FIRST, SECOND = IPv4Address("127.0.0.1"), IPv4Address("127.0.0.2")
NAME = "www.example.com"
RECORDS = {"www.example.com.": ["300 A 93.184.215.14"]}


def unanswered(asked: dns.message.Message) -> None:
    del asked


def with_rcode(rcode: dns.rcode.Rcode):
    def answer(asked: dns.message.Message) -> dns.message.Message:
        made = dns.message.make_response(asked)
        made.set_rcode(rcode)
        return made

    return answer


class Pair:
    """Two nameservers on one port, the first on 127.0.0.1."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.first, self.second = Nameserver(RECORDS), Nameserver(RECORDS)

    async def open(self, **times: float) -> Upstream:
        port = await self._stack.enter_async_context(self.first.serving(str(FIRST)))
        await self._stack.enter_async_context(self.second.serving(str(SECOND), port))
        return Upstream(lambda: (FIRST, SECOND), make_socket, port=port, **times)


async def test_the_second_is_not_asked_while_the_first_answers() -> None:
    async with AsyncExitStack() as stack:
        pair = Pair(stack)
        upstream = await pair.open()
        for stream in (False, True):
            answer = dns.message.from_wire(await upstream.ask(address_question(NAME), stream=stream))
            assert addresses(answer) == ["93.184.215.14"]
            assert answer.id == 0
        assert (len(pair.first.datagrams), len(pair.first.streams), pair.second.heard) == (1, 1, [])


@pytest.mark.parametrize("stream", [False, True], ids=["udp", "tcp"])
@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED])
async def test_who_fails_is_followed_by_the_next(rcode: dns.rcode.Rcode, stream: bool) -> None:
    async with AsyncExitStack() as stack:
        pair = Pair(stack)
        upstream = await pair.open()
        pair.first.answer = with_rcode(rcode)
        answer = dns.message.from_wire(await upstream.ask(address_question(NAME), stream=stream))
        assert addresses(answer) == ["93.184.215.14"]
        pair.second.answer = with_rcode(rcode)
        answer = dns.message.from_wire(await upstream.ask(address_question(NAME), stream=stream))
        assert answer.rcode() == rcode
        assert [len(each.heard) for each in (pair.first, pair.second)] == [2, 2], "nobody is asked twice"


async def test_who_is_silent_is_followed_by_the_next_and_stands_last_after_a_while() -> None:
    async with AsyncExitStack() as stack:
        pair = Pair(stack)
        upstream = await pair.open(try_seconds=0.05)
        pair.first.answer = unanswered
        for _ in range(5):
            await upstream.ask(address_question(NAME), stream=False)
        assert len(pair.second.datagrams) == 5
        assert len(pair.first.datagrams) == 3
        # It speaks again when the other does not.
        pair.first.answer, pair.second.answer = pair.first.answer_from_records, unanswered
        await upstream.ask(address_question(NAME), stream=False)
        assert len(pair.first.datagrams) == 4


async def test_a_slow_answer_counts_though_the_next_was_asked() -> None:
    async with AsyncExitStack() as stack:
        upstream_times = {"try_seconds": 0.05, "total_seconds": 20.0}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as slow:
            slow.bind((str(FIRST), 0))
            port = slow.getsockname()[1]
            other = Nameserver()
            other.answer = unanswered
            await stack.enter_async_context(other.serving(str(SECOND), port))
            upstream = Upstream(lambda: (FIRST, SECOND), make_socket, port=port, **upstream_times)
            asking = asyncio.create_task(upstream.ask(address_question(NAME), stream=False))
            loop = asyncio.get_running_loop()
            wire, sender = await loop.sock_recvfrom(slow, 4096)
            while not other.datagrams:
                await asyncio.sleep(0.01)
            answer = Nameserver(RECORDS).answer_from_records(dns.message.from_wire(wire))
            slow.sendto(answer.to_wire(), sender)
            assert addresses(dns.message.from_wire(await asking)) == ["93.184.215.14"]


async def test_a_nameserver_with_an_ipv6_address() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as serving:
        try:
            serving.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 on loopback")
        upstream = Upstream(lambda: (IPv6Address("::1"),), make_socket, port=serving.getsockname()[1])
        asking = asyncio.create_task(upstream.ask(address_question(NAME), stream=False))
        wire, sender = await asyncio.get_running_loop().sock_recvfrom(serving, 4096)
        serving.sendto(Nameserver(RECORDS).answer_from_records(dns.message.from_wire(wire)).to_wire(), sender)
        assert addresses(dns.message.from_wire(await asking)) == ["93.184.215.14"]


@pytest.mark.parametrize("stream", [False, True], ids=["udp", "tcp"])
async def test_nobody_there(stream: bool) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((str(FIRST), 0))
        port = free.getsockname()[1]
    upstream = Upstream(lambda: (FIRST, SECOND), make_socket, port=port)
    with pytest.raises(NoAnswerError):
        await upstream.ask(address_question(NAME), stream=stream)
    with pytest.raises(NoAnswerError):
        await Upstream(tuple, make_socket).ask(address_question(NAME), stream=stream)


async def test_guests_learn_in_time_that_nobody_answers() -> None:
    """Before a resolver library gives up, which is after 5 s."""
    async with resolver_stage() as stage:
        stage.gate.policies = {"127.0.7.1": listed(NAME)}
        stage.nameserver.answer = stage.second.answer = unanswered
        begun = time.monotonic()
        answer = await stage.ask(NAME, use_edns=0)
        print(f"SERVFAIL after {time.monotonic() - begun:.2f} s")
        assert answer.rcode() == dns.rcode.SERVFAIL
        assert [len(each.datagrams) for each in (stage.nameserver, stage.second)] == [2, 1]


async def test_answers_to_another_question_do_not_count() -> None:
    """From the right address and port, with a wrong identifier or question."""

    def answer(asked: dns.message.Message) -> list[bytes]:
        right = stage.nameserver.answer_from_records(asked)
        forged = dns.message.make_response(asked)
        forged.answer.append(dns.rrset.from_text(NAME + ".", 300, "IN", "A", "1.1.1.1"))
        other_id = bytearray(forged.to_wire())
        other_id[0] ^= 1
        other_name = dns.message.make_query("www.example.net", "A", id=asked.id)
        other_type = dns.message.make_query(NAME, "TXT", id=asked.id)
        others = [dns.message.make_response(each).to_wire() for each in (other_name, other_type)]
        return [bytes(other_id), *others, asked.to_wire(), b"", b"x", right.to_wire()]

    async with resolver_stage() as stage:
        stage.gate.policies = {"127.0.7.1": listed(NAME)}
        stage.nameserver.records = RECORDS
        stage.nameserver.answer = answer
        assert addresses(await stage.ask(NAME)) == ["93.184.215.14"]
        assert len(stage.nameserver.datagrams) == 1


async def test_answers_from_elsewhere_do_not_count() -> None:
    """Everything right but where it comes from: another port of the nameserver's address, another address."""
    async with resolver_stage() as stage:
        stage.gate.policies = {"127.0.7.1": listed(NAME)}
        stage.nameserver.records = RECORDS

        def answer(asked: dns.message.Message) -> dns.message.Message:
            forged = dns.message.make_response(asked)
            forged.answer.append(dns.rrset.from_text(NAME + ".", 300, "IN", "A", "1.1.1.1"))
            target = ("127.0.0.1", stage.nameserver.ports[-1])
            for address in ("127.0.0.1", "127.0.0.2", "127.0.0.99"):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as spoofing:
                    spoofing.bind((address, 0))
                    spoofing.sendto(forged.to_wire(), target)
            return stage.nameserver.answer_from_records(asked)

        stage.nameserver.answer = answer
        assert addresses(await stage.ask(NAME)) == ["93.184.215.14"]
        assert [each[1] for each in stage.gate.opened] == [["93.184.215.14"]]


async def test_no_socket_stays_open() -> None:
    async with resolver_stage(try_seconds=0.05, total_seconds=0.2) as stage:
        stage.gate.policies = {"127.0.7.1": listed(NAME)}
        await stage.ask(NAME)
        before = len(os.listdir("/proc/self/fd"))
        stage.nameserver.answer = stage.second.answer = unanswered
        stage.gate.policies = {"127.0.7.1": listed("*.example.org")}
        for number in range(5):
            assert (await stage.ask(f"n{number}.example.org")).rcode() == dns.rcode.SERVFAIL
        assert len(os.listdir("/proc/self/fd")) == before


def test_nameservers_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    nameservers = NameserverFile(file)
    assert nameservers.current() == (FIRST,), "as resolv.conf(5) has it where there is no file"
    file.write_text(
        "# comment\nsearch lan\nnameserver 127.0.0.53\n nameserver  2001:db8::53 \nnameserver fe80::1%eth0\n"
        "nameserver 192.0.2.1\nnameserver words\nnameserver 192.0.2.2\noptions edns0\n"
    )
    assert nameservers.current() == (
        IPv4Address("127.0.0.53"),
        IPv6Address("2001:db8::53"),
        IPv4Address("192.0.2.1"),
    )


def test_nameservers_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 192.0.2.1\n")
    nameservers = NameserverFile(file)
    assert nameservers.current() == (IPv4Address("192.0.2.1"),)
    fresh = tmp_path / "fresh"
    fresh.write_text("nameserver 192.0.2.2\n")
    fresh.rename(file)
    assert nameservers.current() == (IPv4Address("192.0.2.2"),)
    file.unlink()
    assert nameservers.current() == (FIRST,)
    file.write_bytes(b"\xff\xfe nameserver\nnameserver 0.0.0.0")
    assert nameservers.current() == (FIRST,)
