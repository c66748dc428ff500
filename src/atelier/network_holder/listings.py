"""Reads what nft lists: the objects of a table, their elements and rules. Pure.

Written for what ``rules`` puts there; ``kept_rules`` compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, collapse_addresses, summarize_address_range

from atelier.network_holder.rules import network_text

_OBJECT = re.compile(r"^\t(\w+) (\S+) \{\n(.*?)^\t\}", re.MULTILINE | re.DOTALL)
_ELEMENTS = re.compile(r"\s*elements = \{(.*?)\}", re.DOTALL)
_SET_IN_RULE = re.compile(r"\{ (.*?) \}")
_COUNTED = re.compile(r"([\d.]+) counter packets (\d+) bytes (\d+)")
_LEFT = re.compile(r"([\d.]+) \. ([\d.]+) timeout \w+ expires (\w+)")
_SPAN = re.compile(r"(\d+)([dhms]+)")
_UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@dataclass(frozen=True, slots=True)
class ListedObject:
    """``frame``: its text without its elements."""

    kind: str
    frame: str
    elements: frozenset[str]

    @property
    def rules(self) -> list[str]:
        """Of a chain, each in one line; sets of networks in it in their shortest form."""
        flat = re.sub(r",\n\s+", ", ", self.frame)
        return [_SET_IN_RULE.sub(_shortest, line.strip()) for line in flat.splitlines()]


def parse_table(listing: str) -> dict[str, ListedObject]:
    """Sets, maps and chains by name (of which a set and a chain here never have the same), and what is said of the table
    itself under the empty name."""
    around = " ".join(_OBJECT.sub("", listing).split())
    found = {"": ListedObject("table", around, frozenset())}
    for kind, name, body in _OBJECT.findall(listing):
        elements = _ELEMENTS.search(body)
        texts = elements[1].split(",") if elements else []
        found[name] = ListedObject(
            kind, _ELEMENTS.sub("", body), frozenset(" ".join(text.split()) for text in texts if text.strip())
        )
    return found


def parse_counters(listing: str) -> dict[IPv4Address, tuple[int, int]]:
    """(packets, bytes) by address, of a set with counters."""
    flat = " ".join(listing.split())
    return {IPv4Address(address): (int(packets), int(octets)) for address, packets, octets in _COUNTED.findall(flat)}


def parse_opened(listing: str) -> dict[tuple[IPv4Address, IPv4Address], int]:
    """Seconds that each (guest, address) has left, of the set ``names``."""
    flat = " ".join(listing.split())
    return {(IPv4Address(guest), IPv4Address(to)): _seconds(left) for guest, to, left in _LEFT.findall(flat)}


def parse_marks(listing: str) -> dict[IPv4Address, int]:
    """Of the map ``generation``."""
    found = re.findall(r"([\d.]+) : (0x[0-9a-f]+)", listing)
    return {IPv4Address(address): int(mark, 16) for address, mark in found}


def _seconds(span: str) -> int:
    """Whole ones of such as ``1h2m3s45ms``."""
    return sum(int(number) * _UNIT_SECONDS.get(unit, 0) for number, unit in _SPAN.findall(span))


def _shortest(match: re.Match[str]) -> str:
    try:
        networks = collapse_addresses(network for text in match[1].split(", ") for network in _networks(text))
    except (AddressValueError, ValueError):
        return match[0]
    return f"{{ {', '.join(map(network_text, networks))} }}"


def _networks(text: str) -> Iterator[IPv4Network]:
    first, _, last = text.partition("-")
    if last:
        yield from summarize_address_range(IPv4Address(first), IPv4Address(last))
    else:
        yield IPv4Network(first)
