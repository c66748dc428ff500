"""DNS messages as guests send and get them: read with distrust, built anew. Pure.

Called by ``resolver`` and ``dns_upstream``. Whatever a guest sends is either a ``Question``, or has an answer that says
what is wrong with it, or is not worth one. Sources: RFC 1035, RFC 6891 (EDNS), RFC 8914 (Extended DNS Errors).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.edns import EDECode
from dns.rcode import Rcode

# Not on demand: who had it read a record of a class that none has (*) would have that type forgotten for good.
dns.rdata.load_all_types()

HEADER_LENGTH: Final = 12
UDP_PLAIN_BYTES: Final = 512
"""What a client takes that says nothing of itself. Source: RFC 1035, section 2.3.4."""
UDP_MAX_BYTES: Final = 1232
"""What we take and send by UDP: it is never fragmented. Source: DNS flag day 2020."""

_RESPONSE: Final = 0x8000
_OPCODE: Final = 0x7800
_RECURSION_DESIRED: Final = 0x0100
_HOST_LABEL: Final = re.compile(rb"[A-Za-z0-9_-]{1,63}")
_NAME_MAX_LENGTH: Final = 253


@dataclass(frozen=True, slots=True)
class Question:
    """``wire`` is the whole message. ``payload_bytes``: what its sender takes by UDP; None: it knows no EDNS."""

    wire: bytes
    identifier: int
    name: dns.name.Name
    rdtype: int
    rdclass: int
    flags: int
    payload_bytes: int | None

    @property
    def host_name(self) -> str | None:
        """In lower case, without the last dot; None for what is no host's name. Each dot parts two labels: a label may
        itself hold one in DNS, and would pass for the name of another zone in text."""
        labels = self.name.labels[:-1]
        text = b".".join(labels)
        if not labels or len(text) > _NAME_MAX_LENGTH or not all(_HOST_LABEL.fullmatch(label) for label in labels):
            return None
        return text.decode("ascii").lower()

    def limit_bytes(self, *, stream: bool) -> int:
        """How long an answer may be."""
        if stream:
            return 65535
        return min(max(self.payload_bytes or 0, UDP_PLAIN_BYTES), UDP_MAX_BYTES)

    def answer(
        self,
        rcode: Rcode,
        rrsets: Iterable[dns.rrset.RRset] = (),
        *,
        error: tuple[EDECode, str] | None = None,
        stream: bool,
    ) -> bytes:
        """``error`` is told to who knows EDNS. What is longer than the client takes is truncated, and says so."""
        message = dns.message.Message(self.identifier)
        message.flags = dns.flags.QR | dns.flags.RA | (self.flags & (_RECURSION_DESIRED | dns.flags.CD))
        message.question = [dns.rrset.RRset(self.name, self._class, dns.rdatatype.RdataType.make(self.rdtype))]
        message.answer = list(rrsets)
        if self.payload_bytes is not None:
            options: list[dns.edns.Option] = [dns.edns.EDEOption(*error)] if error else []
            message.use_edns(0, 0, UDP_MAX_BYTES, options=options)
        message.set_rcode(rcode)
        return message.to_wire(max_size=self.limit_bytes(stream=stream), prefer_truncation=True)

    def truncated(self) -> bytes:
        """An empty answer by which the client comes again over TCP."""
        wire = bytearray(self.answer(Rcode.NOERROR, stream=False))
        wire[2] |= dns.flags.TC >> 8
        return bytes(wire)

    @property
    def _class(self) -> dns.rdataclass.RdataClass:
        return dns.rdataclass.RdataClass.make(self.rdclass)


def read_question(wire: bytes) -> Question | bytes | None:
    """The one question of a guest's message; else what to answer, else None."""
    if len(wire) < HEADER_LENGTH:
        return None
    identifier, flags, *counts = struct.unpack_from("!6H", wire)
    if flags & _RESPONSE:
        return None
    if flags & _OPCODE:
        return _bare_answer(identifier, flags, Rcode.NOTIMP)
    end = question_end(wire)
    if counts[:3] != [1, 0, 0] or end is None or not _is_edns_alone(wire[end:], counts[3]):
        return _bare_answer(identifier, flags, Rcode.FORMERR)
    try:
        message = dns.message.from_wire(wire)
    except (dns.exception.DNSException, ValueError):
        return _bare_answer(identifier, flags, Rcode.FORMERR)
    asked = message.question[0]
    question = Question(
        wire,
        identifier,
        asked.name,
        asked.rdtype,
        asked.rdclass,
        flags,
        message.payload if message.edns >= 0 else None,
    )
    if message.edns > 0:
        return question.answer(Rcode.BADVERS, stream=False)
    return question


def _is_edns_alone(additional: bytes, count: int) -> bool:
    """Whether nothing but EDNS' own record follows the question. The library remembers each type and class of record that
    it has read, for ever: no guest may choose them."""
    return count == 0 or (count == 1 and additional[:3] == struct.pack("!BH", 0, dns.rdatatype.OPT))


def question_end(wire: bytes) -> int | None:
    """Where the first question of a message ends. None: it has none, or one that is compressed, which nothing could
    be that stands first."""
    position = HEADER_LENGTH
    while position < len(wire) and 0 < wire[position] < 64:
        position += 1 + wire[position]
    if position >= len(wire) or wire[position] != 0 or position - HEADER_LENGTH >= 255:
        return None
    end = position + 5
    return end if end <= len(wire) else None


def address_question(name: str) -> bytes:
    """Asks for the IPv4 addresses of a host. Its identifier is 0: who sends it gives it one."""
    labels = name.split(".")
    encoded = b"".join(bytes([len(label)]) + label.encode("ascii") for label in labels) + b"\0"
    header = struct.pack("!6H", 0, _RECURSION_DESIRED, 1, 0, 0, 0)
    return header + encoded + struct.pack("!HH", dns.rdatatype.A, dns.rdataclass.IN)


def with_identifier(wire: bytes, identifier: int) -> bytes:
    return struct.pack("!H", identifier) + wire[2:]


def answers(wire: bytes, asked: bytes) -> bool:
    """Whether ``wire`` is an answer to the message ``asked``, going by identifier and question."""
    if len(wire) < HEADER_LENGTH or wire[:2] != asked[:2]:
        return False
    flags, count = struct.unpack_from("!2H", wire, 2)
    if not flags & _RESPONSE or flags & _OPCODE:
        return False
    if count == 0:
        # Who cannot read the question does not repeat it.
        return flags & 0xF in (Rcode.FORMERR, Rcode.NOTIMP)
    end, asked_end = question_end(wire), question_end(asked)
    if count != 1 or end is None or end != asked_end:
        return False
    name, asked_name = wire[HEADER_LENGTH : end - 4], asked[HEADER_LENGTH : end - 4]
    return name.lower() == asked_name.lower() and wire[end - 4 : end] == asked[end - 4 : end]


def is_truncated(wire: bytes) -> bool:
    return bool(wire[2] & dns.flags.TC >> 8)


def rcode_of(wire: bytes) -> int:
    """Its lower four bits, which tell all that matters before the message is read."""
    return wire[3] & 0xF


def failure(wire: bytes) -> bytes | None:
    """Says of a guest's message, whatever it is, that there is no answer to be had now."""
    question = read_question(wire)
    return question.answer(Rcode.SERVFAIL, stream=False) if isinstance(question, Question) else question


def _bare_answer(identifier: int, flags: int, rcode: Rcode) -> bytes:
    return struct.pack("!6H", identifier, _RESPONSE | flags & (_OPCODE | _RECURSION_DESIRED) | rcode, 0, 0, 0, 0)
