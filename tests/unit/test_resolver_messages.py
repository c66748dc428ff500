"""Messages that no honest guest sends: each has a short answer or none, and never an exception."""

from __future__ import annotations

import random
import struct

import dns.edns
import dns.message
import dns.rcode
import dns.rdata
import dns.rdatatype
import dns.rrset
import dns.tsigkeyring
import pytest

from atelier.network_holder.dns_messages import (
    Question,
    address_question,
    answers,
    failure,
    question_end,
    read_question,
)

NAME = b"\3www\7example\3com\0"
TYPE_AND_CLASS = struct.pack("!HH", 1, 1)
EDNS = struct.pack("!BHHIH", 0, 41, 1232, 0, 0)
ANY_RECORD = struct.pack("!BHHIH", 0, 1, 255, 0, 4) + bytes(4)
"""An address of the class *, which no record has."""


def message(question: bytes, *, flags: int = 0x0100, counts: tuple[int, int, int, int] = (1, 0, 0, 0)) -> bytes:
    return struct.pack("!6H", 0x1234, flags, *counts) + question


@pytest.mark.parametrize("wire", [b"", b"\0" * 11, message(NAME + TYPE_AND_CLASS, flags=0x8180)])
def test_what_is_no_question_gets_no_answer(wire: bytes) -> None:
    """An answer to an answer could go back and forth for ever."""
    assert read_question(wire) is None
    assert failure(wire) is None


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        (message(b"", counts=(0, 0, 0, 0)), "FORMERR"),
        (message(b""), "FORMERR"),
        (message(NAME), "FORMERR"),
        (message((NAME + TYPE_AND_CLASS) * 2, counts=(2, 0, 0, 0)), "FORMERR"),
        (message(NAME + TYPE_AND_CLASS, counts=(1, 0, 0, 9)), "FORMERR"),
        (message(NAME + TYPE_AND_CLASS, counts=(1, 1, 0, 0)), "FORMERR"),
        (message(NAME + TYPE_AND_CLASS + ANY_RECORD, counts=(1, 0, 0, 1)), "FORMERR"),
        (message(NAME + TYPE_AND_CLASS + EDNS + ANY_RECORD, counts=(1, 0, 0, 2)), "FORMERR"),
        (message(NAME + TYPE_AND_CLASS + EDNS + EDNS, counts=(1, 0, 0, 2)), "FORMERR"),
        (message(NAME + TYPE_AND_CLASS + b"more"), "FORMERR"),
        (message(b"\xc0\x0c" + TYPE_AND_CLASS), "FORMERR"),
        (message(b"\3www\xc0\x0c" + TYPE_AND_CLASS), "FORMERR"),
        (message(b"\xc0\xff" + TYPE_AND_CLASS), "FORMERR"),
        (message(b"\x40" + b"a" * 64 + b"\0" + TYPE_AND_CLASS), "FORMERR"),
        (message(b"\x3f" + b"a" * 63 + b"\0"), "FORMERR"),
        (message((b"\x3f" + b"a" * 63) * 4 + b"\0" + TYPE_AND_CLASS), "FORMERR"),
        (message((b"\1a" * 2000) + b"\0" + TYPE_AND_CLASS), "FORMERR"),
        (message(NAME + TYPE_AND_CLASS, flags=0x2900), "NOTIMP"),
        (message(NAME + TYPE_AND_CLASS, flags=0x1000), "NOTIMP"),
    ],
)
def test_what_is_malformed_is_told_so(wire: bytes, rcode: str) -> None:
    answer = read_question(wire)
    assert isinstance(answer, bytes)
    assert len(answer) == 12
    assert answer[:2] == wire[:2]
    assert dns.rcode.to_text(answer[3] & 0xF) == rcode


def test_a_later_version_of_edns_is_told_so() -> None:
    answer = read_question(dns.message.make_query("www.example.com", "A", use_edns=1).to_wire())
    assert isinstance(answer, bytes)
    assert dns.message.from_wire(answer).rcode() == dns.rcode.BADVERS


def test_a_question_is_read() -> None:
    query = dns.message.make_query("WWW.Example.com", "TXT", use_edns=0, payload=4096)
    question = read_question(query.to_wire())
    assert isinstance(question, Question)
    assert (question.host_name, question.rdtype) == ("www.example.com", dns.rdatatype.TXT)
    assert (question.limit_bytes(stream=False), question.limit_bytes(stream=True)) == (1232, 65535)
    plain = read_question(message(NAME + TYPE_AND_CLASS))
    assert isinstance(plain, Question)
    assert plain.limit_bytes(stream=False) == 512


@pytest.mark.parametrize("label", [b"a.b", b"a\\", b"*", b"a b", b"\0", b"\xff", b"caf\xc3\xa9"])
def test_a_label_of_other_characters_is_no_hosts(label: bytes) -> None:
    question = read_question(message(bytes([len(label)]) + label + NAME + TYPE_AND_CLASS))
    assert isinstance(question, Question)
    assert question.host_name is None


def test_a_question_made_anew_holds_nothing_but_the_name() -> None:
    assert address_question("www.example.com") == struct.pack("!6H", 0, 0x0100, 1, 0, 0, 0) + NAME + TYPE_AND_CLASS


ASKED = message(NAME + TYPE_AND_CLASS)


@pytest.mark.parametrize(
    ("wire", "accepted"),
    [
        (message(NAME + TYPE_AND_CLASS, flags=0x8180), True),
        (message(NAME.upper() + TYPE_AND_CLASS, flags=0x8180), True),
        (message(b"", flags=0x8181, counts=(0, 0, 0, 0)), True),
        (message(b"", flags=0x8180, counts=(0, 0, 0, 0)), False),
        (b"\x12\x35" + message(NAME + TYPE_AND_CLASS, flags=0x8180)[2:], False),
        (message(NAME + TYPE_AND_CLASS), False),
        (message(NAME + TYPE_AND_CLASS, flags=0xA980), False),
        (message(b"\3www\7exbmple\3com\0" + TYPE_AND_CLASS, flags=0x8180), False),
        (message(NAME + struct.pack("!HH", 28, 1), flags=0x8180), False),
        (message(NAME + struct.pack("!HH", 1, 3), flags=0x8180), False),
        (message(NAME + TYPE_AND_CLASS, flags=0x8180, counts=(2, 0, 0, 0)), False),
        (message(NAME, flags=0x8180), False),
        (b"\x12\x34\x81", False),
    ],
)
def test_an_answer_is_one_to_the_question(wire: bytes, accepted: bool) -> None:
    assert answers(wire, ASKED) is accepted


def test_a_types_bytes_are_compared_as_they_are() -> None:
    """0x41 and 0x61 are one letter and two types."""
    asked = message(NAME + struct.pack("!HH", 0x4141, 1))
    assert not answers(message(NAME + struct.pack("!HH", 0x6161, 1), flags=0x8180), asked)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_messages_never_raise(seed: int) -> None:
    chance = random.Random(seed)
    query = dns.message.make_query("www.example.com", "A", use_edns=0, options=[dns.edns.ECSOption("203.0.113.0", 24)])
    query.use_tsig(dns.tsigkeyring.from_text({"key.": "c2VjcmV0"}))
    whole = [query.to_wire(), ASKED, dns.message.make_query("a.b", "SIG").to_wire()]
    read = 0
    for _ in range(3000):
        wire = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 6)):
            wire[chance.randrange(len(wire))] = chance.choice((0, 1, 0x29, 0xC0, 0xFF, chance.randrange(256)))
        if chance.random() < 0.3:
            del wire[chance.randrange(len(wire)) :]
        question = read_question(bytes(wire))
        if isinstance(question, Question):
            read += 1
            end = question_end(question.wire)
            assert end is not None
            answer = question.answer(dns.rcode.REFUSED, stream=False)
            assert answers(answer, question.wire)
        failure(bytes(wire))
    assert read > 50, "some are readable still"


def test_the_library_learns_nothing_from_guests() -> None:
    """It remembers whatever it has read: once a type is known to it as another class's, it is no longer an address."""
    known = dict(dns.rdata._rdata_classes)
    for kind, kind_class in ((1, 255), (5, 255), (4711, 815), (65000, 1)):
        record = struct.pack("!BHHIH", 0, kind, kind_class, 0, 4) + bytes(4)
        for count in (1, 2):
            read_question(message(NAME + TYPE_AND_CLASS + record * count, counts=(1, 0, 0, count)))
    for size in (512, 1232, 4096, 65535):
        asked = read_question(
            message(NAME + TYPE_AND_CLASS + struct.pack("!BHHIH", 0, 41, size, 0, 0), counts=(1, 0, 0, 1))
        )
        assert isinstance(asked, Question)
    assert dns.rdata._rdata_classes == known
    address = dns.rrset.from_text("www.example.com.", 300, "IN", "A", "192.0.2.1")
    assert type(address[0]) is not dns.rdata.GenericRdata
    assert str(address[0]) == "192.0.2.1"
