"""What guests are answered, what reaches the nameserver of it, and what is opened, by policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Network

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from tests.nameserver import truncated
from tests.unit.resolver_stage import (
    GUEST,
    OTHER,
    STRANGER,
    ResolverStage,
    addresses,
    error_codes,
    listed,
    resolver_stage,
)

from atelier.model.errors import HostError
from atelier.model.network_policy import EgressMode, EgressPolicy
from atelier.network_holder.dns_messages import address_question
from atelier.network_holder.resolver import GRACE_SECONDS, MAX_TTL_SECONDS, MIN_TTL_SECONDS

ALL = EgressPolicy()
NONE = EgressPolicy.make(EgressMode.NONE)
PUBLIC, PUBLIC_TOO = "93.184.215.14", "93.184.215.15"


@pytest.fixture
async def stage() -> AsyncIterator[ResolverStage]:
    async with resolver_stage() as made:
        made.gate.policies = {GUEST: listed("www.example.com", "*.example.org"), OTHER: ALL}
        made.nameserver.records = {
            "www.example.com.": [f"300 A {PUBLIC}"],
            "deep.down.example.org.": [f"300 A {PUBLIC_TOO}"],
            "example.com.": ["300 TXT hello", f"300 A {PUBLIC}"],
        }
        yield made


def only_the_name(wire: bytes, name: str) -> bool:
    """Whether a message is nothing but a question for the addresses of this name, apart from its identifier."""
    return wire[2:] == address_question(name)[2:]


async def test_an_allowed_name_is_answered_and_opened(stage: ResolverStage) -> None:
    answer = await stage.ask("www.example.com")
    assert addresses(answer) == [PUBLIC]
    assert answer.flags & dns.flags.RA
    assert answer.answer[0].ttl == 300
    assert stage.gate.opened == [(GUEST, [PUBLIC], 300 + GRACE_SECONDS)]


async def test_names_below_a_wildcard_are_answered_and_itself_is_not(stage: ResolverStage) -> None:
    assert addresses(await stage.ask("deep.down.example.org")) == [PUBLIC_TOO]
    assert (await stage.ask("example.org")).rcode() == dns.rcode.REFUSED


@pytest.mark.parametrize(
    "name", ["example.com", "secret.www.example.com", "www.example.com.evil.net", "com", ".", "localhost"]
)
@pytest.mark.parametrize("stream", [False, True], ids=["udp", "tcp"])
async def test_another_name_is_refused_and_nobody_hears_of_it(stage: ResolverStage, name: str, stream: bool) -> None:
    answer = await stage.ask(name, use_edns=0, stream=stream)
    assert answer.rcode() == dns.rcode.REFUSED
    assert error_codes(answer) == [dns.edns.EDECode.BLOCKED]
    assert stage.nameserver.heard == []
    assert stage.gate.opened == []


async def test_who_knows_no_edns_is_sent_none(stage: ResolverStage) -> None:
    answer = await stage.ask("example.com", use_edns=False)
    assert answer.rcode() == dns.rcode.REFUSED
    assert answer.edns == -1


@pytest.mark.parametrize("policy", [NONE, None], ids=["none", "no slot"])
async def test_without_a_way_out_nothing_is_answered(stage: ResolverStage, policy: EgressPolicy | None) -> None:
    if policy is not None:
        stage.gate.policies[STRANGER] = policy
    for kind in ("A", "AAAA", "TXT"):
        answer = await stage.ask("www.example.com", kind, STRANGER, use_edns=0)
        assert answer.rcode() == dns.rcode.REFUSED
        assert error_codes(answer) == [dns.edns.EDECode.PROHIBITED]
    assert stage.nameserver.heard == []


@pytest.mark.parametrize("kind", ["AAAA", "HTTPS", "SVCB", "TXT", "NULL", "MX", "ANY", "TYPE65280"])
async def test_other_types_of_an_allowed_name_are_empty_and_nobody_hears_of_them(
    stage: ResolverStage, kind: str
) -> None:
    answer = await stage.ask("www.example.com", kind)
    assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
    assert stage.nameserver.heard == []


async def test_nothing_of_the_guests_but_the_name_goes_out(stage: ResolverStage) -> None:
    """Case, flags, options, the client's payload size, cookies, padding."""
    options = [
        dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"stolen77"),
        dns.edns.GenericOption(65001, b"stolen data"),
        dns.edns.ECSOption("203.0.113.0", 24),
    ]
    query = dns.message.make_query("wWw.eXaMpLe.cOm", "A", use_edns=0, payload=4001, options=options, want_dnssec=True)
    query.flags |= dns.flags.AD | dns.flags.CD
    wire = await stage.send(query.to_wire())
    answer = dns.message.from_wire(wire)
    assert addresses(answer) == [PUBLIC]
    assert answer.question[0].name.to_text() == "wWw.eXaMpLe.cOm.", "the guest gets its own spelling back"
    (heard,) = stage.nameserver.datagrams
    assert only_the_name(heard, "www.example.com")


async def test_what_hides_in_a_message_goes_nowhere(stage: ResolverStage) -> None:
    """Records in other sections, a second question, another class, bytes behind the end."""
    extra = dns.rrset.from_text("stolen.evil.net.", 5, "IN", "TXT", "stolen")
    for section in ("answer", "authority", "additional"):
        query = dns.message.make_query("www.example.com", "A")
        getattr(query, section).append(extra)
        await stage.send(query.to_wire())
    query = dns.message.make_query("www.example.com", "A")
    query.question.append(dns.message.make_query("stolen.evil.net", "A").question[0])
    answer = dns.message.from_wire(await stage.send(query.to_wire()))
    assert answer.rcode() == dns.rcode.FORMERR
    chaos = dns.message.make_query("www.example.com", "A", rdclass="CH")
    assert dns.message.from_wire(await stage.send(chaos.to_wire())).rcode() == dns.rcode.REFUSED
    await stage.send(dns.message.make_query("www.example.com", "A").to_wire() + b"stolen")
    assert all(only_the_name(wire, "www.example.com") for wire in stage.nameserver.datagrams)
    assert stage.nameserver.streams == []


async def test_a_dot_within_a_label_makes_no_other_zones_name(stage: ResolverStage) -> None:
    """Read as text, both would lie where the policy allows everything; in truth they are names of evil.net's, and of a
    label that ends in a dot."""
    stage.gate.policies[GUEST] = listed("*.safe.evil.net")
    for labels in ((b"stolen.safe", b"evil", b"net", b""), (b"a\\.safe", b"evil", b"net", b"")):
        query = dns.message.make_query(dns.name.Name(labels), "A")
        assert dns.message.from_wire(await stage.send(query.to_wire())).rcode() == dns.rcode.REFUSED
    assert stage.nameserver.heard == []


async def test_each_question_has_an_identifier_and_a_port_of_its_own(stage: ResolverStage) -> None:
    names = [f"n{number}.example.org" for number in range(8)]
    stage.nameserver.records = {f"{name}.": [f"300 A {PUBLIC}"] for name in names}
    for name in names:
        query = dns.message.make_query(name, "A", id=4711)
        assert await stage.send(query.to_wire()) is not None
    assert len({wire[:2] for wire in stage.nameserver.datagrams}) > 4
    assert len(set(stage.nameserver.ports)) > 4


async def test_a_chain_of_aliases_is_followed_and_kept(stage: ResolverStage) -> None:
    stage.nameserver.records = {
        "www.example.com.": ["600 CNAME edge.cdn.net."],
        "edge.cdn.net.": ["60 CNAME pop.cdn.net."],
        "pop.cdn.net.": [f"900 A {PUBLIC}", f"900 A {PUBLIC_TOO}"],
    }
    answer = await stage.ask("www.example.com")
    assert [(rrset.name.to_text(), dns.rdatatype.to_text(rrset.rdtype)) for rrset in answer.answer] == [
        ("www.example.com.", "CNAME"),
        ("edge.cdn.net.", "CNAME"),
        ("pop.cdn.net.", "A"),
    ]
    assert {rrset.ttl for rrset in answer.answer} == {60}, "the chain holds as long as its weakest link"
    ((guest, opened, seconds),) = stage.gate.opened
    assert (guest, sorted(opened), seconds) == (GUEST, [PUBLIC, PUBLIC_TOO], 60 + GRACE_SECONDS)
    assert (await stage.ask("edge.cdn.net")).rcode() == dns.rcode.REFUSED, "an alias is not allowed by itself"


async def test_records_beside_the_chain_are_ignored(stage: ResolverStage) -> None:
    def answer(asked: dns.message.Message) -> dns.message.Message:
        made = stage.nameserver.answer_from_records(asked)
        for section in (made.answer, made.authority, made.additional):
            section.append(dns.rrset.from_text("victim.example.net.", 300, "IN", "A", "1.1.1.1"))
        return made

    stage.nameserver.answer = answer
    got = await stage.ask("www.example.com")
    assert addresses(got) == [PUBLIC]
    assert (got.authority, got.additional) == ([], [])
    assert stage.gate.opened == [(GUEST, [PUBLIC], 300 + GRACE_SECONDS)]


async def test_aliases_in_a_circle_are_a_failure(stage: ResolverStage) -> None:
    stage.nameserver.records = {
        "www.example.com.": ["300 CNAME a.example.net."],
        "a.example.net.": ["300 CNAME www.example.com."],
    }
    assert (await stage.ask("www.example.com")).rcode() == dns.rcode.SERVFAIL
    assert stage.gate.opened == []


async def test_a_name_that_points_to_private_addresses_is_empty(stage: ResolverStage) -> None:
    stage.nameserver.records["www.example.com."] = ["300 A 192.168.1.1", "300 A 169.254.169.254", "300 A 127.0.0.1"]
    answer = await stage.ask("www.example.com", use_edns=0)
    assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
    assert error_codes(answer) == [dns.edns.EDECode.BLOCKED]


async def test_only_what_was_opened_is_answered(stage: ResolverStage) -> None:
    stage.nameserver.records["www.example.com."] = ["300 A 10.0.0.1", f"300 A {PUBLIC}"]
    assert addresses(await stage.ask("www.example.com")) == [PUBLIC]
    assert stage.gate.opened == [(GUEST, [PUBLIC], 300 + GRACE_SECONDS)]


async def test_what_cannot_be_opened_is_not_answered(stage: ResolverStage) -> None:
    stage.gate.fails_with = HostError("nft: no memory")
    answer = await stage.ask("www.example.com")
    assert (answer.rcode(), answer.answer) == (dns.rcode.SERVFAIL, [])


@pytest.mark.parametrize(("given", "kept"), [(0, MIN_TTL_SECONDS), (86400, MAX_TTL_SECONDS), (77, 77)])
async def test_times_to_live_are_kept_within_bounds(stage: ResolverStage, given: int, kept: int) -> None:
    stage.nameserver.records["www.example.com."] = [f"{given} A {PUBLIC}"]
    answer = await stage.ask("www.example.com")
    assert answer.answer[0].ttl == kept
    assert stage.gate.opened == [(GUEST, [PUBLIC], kept + GRACE_SECONDS)]


async def test_a_kept_answer_is_opened_for_each_guest_that_asks(stage: ResolverStage) -> None:
    stage.gate.policies[OTHER] = listed("www.example.com")
    for guest in (GUEST, OTHER):
        assert addresses(await stage.ask("www.example.com", guest=guest)) == [PUBLIC]
    assert len(stage.nameserver.heard) == 1
    assert [opened[:2] for opened in stage.gate.opened] == [(GUEST, [PUBLIC]), (OTHER, [PUBLIC])]
    assert (await stage.ask("www.example.com", guest=STRANGER)).rcode() == dns.rcode.REFUSED


async def test_a_name_that_does_not_exist(stage: ResolverStage) -> None:
    answer = await stage.ask("nothing.example.org")
    assert (answer.rcode(), answer.answer) == (dns.rcode.NXDOMAIN, [])
    assert stage.gate.opened == []


async def test_a_policy_that_changes_while_a_name_is_looked_up(stage: ResolverStage) -> None:
    def answer(asked: dns.message.Message) -> dns.message.Message:
        stage.gate.policies[GUEST] = listed("other.example.com")
        return stage.nameserver.answer_from_records(asked)

    stage.nameserver.answer = answer
    assert (await stage.ask("www.example.com")).rcode() == dns.rcode.REFUSED
    assert stage.gate.opened == []


async def test_an_answer_too_long_for_udp_is_fetched_over_tcp(stage: ResolverStage) -> None:
    everything = [f"300 A 93.184.216.{number}" for number in range(50)]
    stage.nameserver.records["www.example.com."] = everything

    def answer(asked: dns.message.Message) -> dns.message.Message:
        return stage.nameserver.answer_from_records(asked) if stage.nameserver.streams else truncated(asked)

    stage.nameserver.answer = answer
    short = await stage.ask("www.example.com", use_edns=False)
    assert short.flags & dns.flags.TC
    assert len(addresses(await stage.ask("www.example.com", stream=True))) == len(everything)
    assert len(addresses(await stage.ask("www.example.com", use_edns=0, payload=4096))) == len(everything)
    assert len(stage.nameserver.datagrams) == len(stage.nameserver.streams) == 1


async def test_the_whole_internet_is_asked_for_anything(stage: ResolverStage) -> None:
    answer = await stage.ask("example.com", "TXT", OTHER)
    assert [each.to_text() for each in answer.answer[0]] == ['"hello"']
    assert addresses(await stage.ask("example.com", "A", OTHER, stream=True)) == [PUBLIC]
    assert len(stage.nameserver.streams) == 1, "asked over TCP, asked on over TCP"
    assert stage.gate.opened == [], "its rules ask for no names"
    assert stage.nameserver.heard[0].id != answer.id or stage.nameserver.heard[1].id != answer.id


async def test_with_the_whole_internet_truncation_is_the_clients_to_mend(stage: ResolverStage) -> None:
    stage.nameserver.answer = truncated
    assert (await stage.ask("example.com", "TXT", OTHER)).flags & dns.flags.TC
    stage.nameserver.answer = lambda asked: stage.nameserver.answer_from_records(asked).to_wire() + bytes(1500)
    assert (await stage.ask("example.com", "TXT", OTHER)).flags & dns.flags.TC


@pytest.mark.parametrize("kind", ["AXFR", "IXFR"])
async def test_zones_are_not_transferred(stage: ResolverStage, kind: str) -> None:
    query = dns.message.make_query("example.com", "TXT").to_wire()
    wire = query[:-4] + int(dns.rdatatype.from_text(kind)).to_bytes(2) + query[-2:]
    assert dns.message.from_wire(await stage.send(wire, OTHER)).rcode() == dns.rcode.REFUSED
    assert stage.nameserver.heard == []


async def test_listed_networks_change_nothing_for_names(stage: ResolverStage) -> None:
    stage.gate.policies[GUEST] = EgressPolicy(EgressMode.LIST, (IPv4Network("93.184.0.0/16"),), ())
    assert (await stage.ask("www.example.com")).rcode() == dns.rcode.REFUSED


async def test_many_guests_at_once(stage: ResolverStage) -> None:
    guests = [f"127.0.8.{number}" for number in range(1, 101)]
    stage.gate.policies |= {guest: listed("www.example.com") for guest in guests}
    answers = await asyncio.gather(*(stage.ask("www.example.com", guest=guest) for guest in guests))
    assert all(addresses(answer) == [PUBLIC] for answer in answers)
    assert {opened[0] for opened in stage.gate.opened} == set(guests)
