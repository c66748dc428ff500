"""Answers guests' questions for names, as far as each guest's egress policy lets it ask.

Called by ``dns_server`` with what a guest sent. In the mode ``all`` a question is asked on as it came. In the mode
``list`` nothing of the guest's leaves but the one allowed name that it asked for, in lower case: the question is built
anew, asks for IPv4 addresses and nothing else, and the addresses that answer it are opened to that guest, for as long
as the answer may be kept, before it gets them. So a name is no tunnel, and an address is reached by its name alone.

What remains by design: who allows ``*.example.org`` lets a guest tell the owner of example.org whatever fits in a name.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Protocol, cast

import dns.exception
import dns.message
import dns.name
import dns.rdata
import dns.rrset
from dns.edns import EDECode
from dns.rcode import Rcode
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType
from dns.rdtypes.ANY.CNAME import CNAME
from dns.rdtypes.IN.A import A

from atelier.model.network_policy import EgressMode, EgressPolicy
from atelier.network_holder.dns_messages import (
    Question,
    address_question,
    is_truncated,
    read_question,
)
from atelier.network_holder.dns_upstream import Address, NoAnswerError, Upstream

MIN_TTL_SECONDS = 5
MAX_TTL_SECONDS = 3600
GRACE_SECONDS = 30
"""An address stays open that much longer than its answer may be kept: who asked at the last moment connects a little
later."""

_MISSING_TTL_SECONDS = 60
"""At most so long is remembered that a name has no address."""
_MAX_ADDRESSES = 64
"""Of one answer."""
_CACHE_SIZE = 4096

_logger = logging.getLogger(__name__)


class NameGate(Protocol):
    """What the network's home knows of guests, and does for them."""

    def policy_of(self, guest: IPv4Address) -> EgressPolicy | None:
        """None: no slot has this address."""
        ...

    def open_addresses(self, guest: IPv4Address, addresses: Sequence[IPv4Address], seconds: int) -> list[IPv4Address]:
        """Let the guest begin connections to those of ``addresses`` that a name may open (nothing private, nothing of
        this machine's); says which they are. Done when it returns. Raises HostError, OSError."""
        ...


@dataclass(frozen=True, slots=True)
class _Found:
    """What a name leads to. ``aliases``: from each to the next, the first is the name's own target."""

    rcode: Rcode
    aliases: tuple[dns.name.Name, ...]
    addresses: tuple[IPv4Address, ...]
    expires_at: float


class Resolver:
    """One for all guests; what one guest had asked for answers another, which is allowed to ask for it, too."""

    def __init__(self, gate: NameGate, upstream: Upstream) -> None:
        self._gate = gate
        self._upstream = upstream
        self._cache: OrderedDict[tuple[str, tuple[Address, ...]], _Found] = OrderedDict()

    async def answer(self, guest: IPv4Address, wire: bytes, *, stream: bool) -> bytes | None:
        """What to send back for the message that a guest sent, None: nothing. ``stream``: it came over TCP.

        Raises HostError and OSError where an address could not be opened."""
        question = read_question(wire)
        if not isinstance(question, Question):
            return question
        policy = self._gate.policy_of(guest)
        if policy is None or policy.mode is EgressMode.NONE:
            return _refusal(question, EDECode.PROHIBITED, "the sandbox's egress mode is none", stream=stream)
        if question.rdtype in (RdataType.AXFR, RdataType.IXFR):
            return _refusal(question, EDECode.NOT_SUPPORTED, "zones are not transferred", stream=stream)
        if policy.mode is EgressMode.ALL:
            return await self._relay(question, stream=stream)
        name = question.host_name
        if name is None or question.rdclass != RdataClass.IN or not policy.allows_name(name):
            return _not_allowed(question, stream=stream)
        if question.rdtype != RdataType.A:
            return question.answer(Rcode.NOERROR, stream=stream)
        return await self._resolve(guest, question, name, stream=stream)

    async def _relay(self, question: Question, *, stream: bool) -> bytes:
        try:
            answer = await self._upstream.ask(question.wire, stream=stream)
        except NoAnswerError:
            return _no_answer(question, stream=stream)
        return answer if len(answer) <= question.limit_bytes(stream=stream) else question.truncated()

    async def _resolve(self, guest: IPv4Address, question: Question, name: str, *, stream: bool) -> bytes:
        try:
            found = await self._find(name)
        except NoAnswerError:
            return _no_answer(question, stream=stream)
        # The policy may have changed while the question was asked on. Nothing is awaited from here on.
        policy = self._gate.policy_of(guest)
        if policy is None or policy.mode is not EgressMode.LIST or not policy.allows_name(name):
            return _not_allowed(question, stream=stream)
        seconds = max(1, round(found.expires_at - asyncio.get_running_loop().time()))
        opened: list[IPv4Address] = []
        if found.addresses:
            opened = self._gate.open_addresses(guest, found.addresses, seconds + GRACE_SECONDS)
            if not opened:
                error = EDECode.BLOCKED, "the name points to addresses that no name may open"
                return question.answer(Rcode.NOERROR, error=error, stream=stream)
        return question.answer(found.rcode, _rrsets(question.name, found.aliases, opened, seconds), stream=stream)

    async def _find(self, name: str) -> _Found:
        """Raises NoAnswerError."""
        now = asyncio.get_running_loop().time()
        # Other nameservers (a VPN's, for instance) may know other addresses.
        key = name, tuple(self._upstream.nameservers())
        found = self._cache.get(key)
        if found is not None and found.expires_at > now:
            self._cache.move_to_end(key)
            return found
        question = address_question(name)
        wire = await self._upstream.ask(question, stream=False)
        if is_truncated(wire):
            wire = await self._upstream.ask(question, stream=True)
        found = _read(wire, asyncio.get_running_loop().time())
        if found.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
            self._cache[key] = found
            self._cache.move_to_end(key)
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return found


def _read(wire: bytes, now: float) -> _Found:
    """The chain of aliases that begins at the name asked for, and the addresses at its end; whatever else the answer
    holds is ignored. Raises NoAnswerError for what cannot be read."""
    try:
        message = dns.message.from_wire(wire)
        assert isinstance(message, dns.message.QueryMessage), "its operation code is QUERY"
        rcode = message.rcode()
        if rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
            return _Found(Rcode.SERVFAIL, (), (), now)
        chain = message.resolve_chaining()
    except (dns.exception.DNSException, ValueError) as error:
        _logger.debug("a nameserver's answer cannot be read: %r", error)
        raise NoAnswerError from error
    aliases = tuple(each.target for rrset in chain.cnames for each in _rdatas(rrset) if isinstance(each, CNAME))
    answer = _rdatas(chain.answer) if chain.answer is not None else []
    addresses = tuple(IPv4Address(each.address) for each in answer if isinstance(each, A))[:_MAX_ADDRESSES]
    longest = MAX_TTL_SECONDS if addresses else _MISSING_TTL_SECONDS
    return _Found(rcode, aliases, addresses, now + min(max(chain.minimum_ttl, MIN_TTL_SECONDS), longest))


def _rdatas(rrset: dns.rrset.RRset) -> list[dns.rdata.Rdata]:
    return list(cast("Iterable[dns.rdata.Rdata]", rrset))


def _rrsets(
    name: dns.name.Name, aliases: Sequence[dns.name.Name], addresses: Sequence[IPv4Address], ttl: int
) -> list[dns.rrset.RRset]:
    rrsets: list[dns.rrset.RRset] = []
    for alias in aliases:
        rrsets.append(dns.rrset.from_text(name, ttl, RdataClass.IN, RdataType.CNAME, alias.to_text()))
        name = alias
    if addresses:
        rrsets.append(dns.rrset.from_text_list(name, ttl, RdataClass.IN, RdataType.A, list(map(str, addresses))))
    return rrsets


def _refusal(question: Question, code: EDECode, text: str, *, stream: bool) -> bytes:
    return question.answer(Rcode.REFUSED, error=(code, text), stream=stream)


def _not_allowed(question: Question, *, stream: bool) -> bytes:
    return _refusal(question, EDECode.BLOCKED, "the sandbox's egress policy does not list this name", stream=stream)


def _no_answer(question: Question, *, stream: bool) -> bytes:
    error = EDECode.NO_REACHABLE_AUTHORITY, "no nameserver of the host answers"
    return question.answer(Rcode.SERVFAIL, error=error, stream=stream)
