"""Changes of packet filter rules as the kernel's own messages: what ``host.nftables`` applies in one transaction.

For what is changed often. libnftables reads every chain of the namespace before each change, which takes four
milliseconds where there are a thousand; these take a fraction of one. What is changed seldom is better said in words.
Source: linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Literal, NamedTuple

from atelier.host.netlink import packed_attribute, packed_nest

Family = Literal["inet", "netdev"]

_FAMILIES = {"inet": 1, "netdev": 5}
_CREATE, _APPEND = 0x400, 0x800
_NEW_CHAIN, _DELETE_CHAIN, _NEW_RULE, _NEW_ELEMENT, _DELETE_ELEMENT = 3, 5, 6, 12, 14
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_HOOK_NUMBER, _HOOK_PRIORITY, _HOOK_DEVICE = 1, 2, 3
_INGRESS, _DROP, _ACCEPT, _JUMP = 0, 0, 1, -3
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_ITEM, _EXPRESSION_NAME, _EXPRESSION_DATA = 1, 1, 2
_VALUE, _VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEMENT_KEY, _ELEMENT_DATA, _ELEMENT_TIMEOUT = 1, 2, 4
_REGISTER, _VERDICT_REGISTER = 1, 0
_LINK_HEADER, _NETWORK_HEADER = 0, 1
_META_PROTOCOL, _META_INPUT_TYPE = 1, 8
_ETHERNET = struct.pack("=H", 1)
_OF_BYTES, _INVERTED = 1, 1


class RulesMessage(NamedTuple):
    """``kind`` is nftables' own number; ``body`` follows the header, its length a multiple of four."""

    kind: int
    flags: int
    body: bytes


# --- chains and rules -------------------------------------------------------------------------------------------------


def ingress_chain_added(table: str, chain: str, device: str, priority: int) -> RulesMessage:
    """Of the family netdev, with the policy accept."""
    hook = _number(_HOOK_NUMBER, _INGRESS) + _number(_HOOK_PRIORITY, priority) + _text(_HOOK_DEVICE, device)
    body = _text(_CHAIN_TABLE, table) + _text(_CHAIN_NAME, chain) + packed_nest(_CHAIN_HOOK, hook)
    return _message(
        "netdev", _NEW_CHAIN, _CREATE, body + _number(_CHAIN_POLICY, _ACCEPT) + _text(_CHAIN_TYPE, "filter")
    )


def chain_absent(family: Family, table: str, chain: str) -> list[RulesMessage]:
    """With its rules; also where there is none."""
    body = _text(_CHAIN_TABLE, table) + _text(_CHAIN_NAME, chain)
    return [_message(family, _NEW_CHAIN, _CREATE, body), _message(family, _DELETE_CHAIN, 0, body)]


def rule_added(family: Family, table: str, chain: str, expressions: Sequence[bytes]) -> RulesMessage:
    """At the chain's end."""
    listed = b"".join(packed_nest(_ITEM, expression) for expression in expressions)
    body = _text(_RULE_TABLE, table) + _text(_RULE_CHAIN, chain) + packed_nest(_RULE_EXPRESSIONS, listed)
    return _message(family, _NEW_RULE, _CREATE | _APPEND, body)


# --- expressions ------------------------------------------------------------------------------------------------------


def is_ethernet() -> list[bytes]:
    return [_meta(_META_INPUT_TYPE), _equals(_ETHERNET)]


def is_protocol(number: int) -> list[bytes]:
    """``number``: an Ethernet type."""
    return [_meta(_META_PROTOCOL), _equals(struct.pack("!H", number))]


def link_header_is(offset: int, value: bytes) -> list[bytes]:
    return [_payload(_LINK_HEADER, offset, len(value)), _equals(value)]


def network_header_is(offset: int, value: bytes) -> list[bytes]:
    return [_payload(_NETWORK_HEADER, offset, len(value)), _equals(value)]


def is_beyond(bytes_per_second: int, burst_bytes: int) -> list[bytes]:
    data = packed_attribute(1, struct.pack("!Q", bytes_per_second)) + packed_attribute(2, struct.pack("!Q", 1))
    data += _number(3, burst_bytes) + _number(4, _OF_BYTES) + _number(5, _INVERTED)
    return [_expression("limit", data)]


def accept() -> list[bytes]:
    return [_immediate(_ACCEPT)]


def drop() -> list[bytes]:
    return [_immediate(_DROP)]


# --- elements of sets -------------------------------------------------------------------------------------------------


def address_key(*parts: IPv4Address | int) -> bytes:
    """Of addresses and marks, one after the other. A mark is in the machine's own order of bytes."""
    return b"".join(struct.pack("=I", part) if isinstance(part, int) else part.packed for part in parts)


def element_added(
    table: str,
    name: str,
    key: bytes,
    *,
    mark: int | None = None,
    jump_to: str | None = None,
    seconds: int | None = None,
) -> RulesMessage:
    """Of the family inet; of a map to marks or verdicts with ``mark`` or ``jump_to``, of a set with time limits with
    ``seconds``. One that is there already stays as it is."""
    element = packed_nest(_ELEMENT_KEY, packed_attribute(_VALUE, key))
    if mark is not None:
        element += packed_nest(_ELEMENT_DATA, packed_attribute(_VALUE, struct.pack("=I", mark)))
    if jump_to is not None:
        verdict = _number(_VERDICT_CODE, _JUMP) + _text(_VERDICT_CHAIN, jump_to)
        element += packed_nest(_ELEMENT_DATA, packed_nest(_VERDICT, verdict))
    if seconds is not None:
        element += packed_attribute(_ELEMENT_TIMEOUT, struct.pack("!Q", seconds * 1000))
    return _element(_NEW_ELEMENT, _CREATE, table, name, element)


def element_removed(table: str, name: str, key: bytes) -> RulesMessage:
    """The kernel refuses the transaction if there is none."""
    return _element(_DELETE_ELEMENT, 0, table, name, packed_nest(_ELEMENT_KEY, packed_attribute(_VALUE, key)))


# --- their parts ------------------------------------------------------------------------------------------------------


def _message(family: Family, kind: int, flags: int, body: bytes) -> RulesMessage:
    return RulesMessage(kind, flags, struct.pack("=BBH", _FAMILIES[family], 0, 0) + body)


def _element(kind: int, flags: int, table: str, name: str, element: bytes) -> RulesMessage:
    body = _text(_LIST_TABLE, table) + _text(_LIST_SET, name)
    return _message("inet", kind, flags, body + packed_nest(_LIST_ELEMENTS, packed_nest(_ITEM, element)))


def _expression(name: str, data: bytes) -> bytes:
    return _text(_EXPRESSION_NAME, name) + packed_nest(_EXPRESSION_DATA, data)


def _meta(key: int) -> bytes:
    return _expression("meta", _number(1, _REGISTER) + _number(2, key))


def _payload(header: int, offset: int, length: int) -> bytes:
    return _expression("payload", _number(1, _REGISTER) + _number(2, header) + _number(3, offset) + _number(4, length))


def _equals(value: bytes) -> bytes:
    return _expression("cmp", _number(1, _REGISTER) + _number(2, 0) + packed_nest(3, packed_attribute(_VALUE, value)))


def _immediate(code: int) -> bytes:
    verdict = packed_nest(_VERDICT, _number(_VERDICT_CODE, code))
    return _expression("immediate", _number(1, _VERDICT_REGISTER) + packed_nest(2, verdict))


def _number(kind: int, value: int) -> bytes:
    return packed_attribute(kind, struct.pack("!i" if value < 0 else "!I", value))


def _text(kind: int, value: str) -> bytes:
    return packed_attribute(kind, value.encode() + b"\0")
