"""The packet filter rules: all of them as text for nftables, and a slot's as the kernel's messages too, which say the same
(a test holds them equal). Pure. Every rule here is needed: a test takes one away at a time and sees a packet pass that must
not, or one kept back that must pass.

Two namespaces: the **home**, where the bridge is, and the **host**, which the home's traffic crosses on its way out. All
of a namespace's tables are replaced in one transaction; a slot comes, changes and goes in one of its own.

How the home judges a guest's packets: a flow that its policy has let pass carries the **generation** of that policy in
its conntrack mark, and passes for as long as that is the guest's current generation. What carries another, or none, is
judged: by the guest's verdict in the map ``egress`` (none there: nothing passes), on the address to which the flow was
opened. So a new policy is in force for open flows in the same moment, and what the host sends on a flow that stays
allowed goes on without waiting for the guest.

Tables are replaced while guests send. The kernel then changes from the old rules to the new ones at one moment, but gives a
new chain its policy, and a new set its intervals, a little later. So whatever is refused is refused by a rule, and a set of
intervals says what may pass: while it looks empty nothing does. (A single packet that passed would leave a flow open.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from atelier.host.nftables_messages import (
    RulesMessage,
    accept,
    address_key,
    chain_absent,
    drop,
    element_added,
    element_removed,
    ingress_chain_added,
    is_beyond,
    is_ethernet,
    is_protocol,
    link_header_is,
    network_header_is,
    rule_added,
)
from atelier.model.address_plan import SLOT_COUNT, AddressPlan
from atelier.model.network_policy import EgressMode, NetworkPolicy
from atelier.network_holder.names import NetworkNames

_NEVER = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, the metadata services of clouds among them
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
_PRIVATE = tuple(IPv4Network(text) for text in ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"))
_INLINE_NETWORKS = 16
"""Above that a slot's networks become a set. Not below: libnftables reads all sets of intervals before each change, so a
thousand of them would cost each change 0.1 s."""
_BYTES_PER_KBIT = 125
_INGRESS_PRIORITY = -500
_IPV4, _ARP = 0x0800, 0x0806
"""Ethernet types."""
_ASKING_PER_SECOND, _ASKING_BURST = 500, 1000
"""Packets that one guest may send to the resolver, which bounds questions more closely by itself: a flood must not even
reach its queue, where others' questions would be lost."""
MAX_FLOWS = 8192
"""That one guest may have open at a time, those that the kernel still remembers included: all guests and the host share one
table, of some 262,144 by default, and when it is full nobody opens another."""
_UPLOAD_BURST_BYTES = 65536
"""Beside what passes in a second: the largest packet that a guest may hand over, to be cut later, has to fit."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the home stands in. ``own``: what the host takes for itself. ``connected``: networks that it reaches without another
    router. ``uplink``: the link that leads out; None: the home is in the host's own namespace, beside others' links."""

    plan: AddressPlan
    uplink: str | None
    own: frozenset[IPv4Network]
    connected: frozenset[IPv4Network]

    @property
    def never(self) -> set[IPv4Network]:
        """What no policy opens."""
        return {*_NEVER, self.plan.subnet, *self.own}

    @property
    def private(self) -> set[IPv4Network]:
        """What only a listed network opens, no domain and not the mode ``all``."""
        return {*_PRIVATE, *self.connected}

    def is_never(self, address: IPv4Address) -> bool:
        return any(address in network for network in self.never)

    def is_private(self, address: IPv4Address) -> bool:
        return any(address in network for network in self.private)


@dataclass(frozen=True, slots=True)
class Slot:
    """What a TAP may send from, and what to. ``generation``: a number of 32 bits, never 0, never used for the same address
    before (see ``policies``)."""

    tap: str
    mac_address: str
    address: IPv4Address
    policy: NetworkPolicy
    generation: int

    @property
    def mark(self) -> str:
        return f"{self.generation:#010x}"

    @property
    def chain(self) -> str | None:
        """Of its own, where the policy has more to say than a mode; each generation's has another name."""
        egress = self.policy.egress
        return f"{self.tap}_{self.generation:08x}" if egress.networks or egress.domains else None

    @property
    def judge(self) -> str | None:
        """The chain that says what it may open; None: whatever it sends is refused."""
        if self.chain is not None:
            return self.chain
        return "public" if self.policy.egress.mode is EgressMode.ALL else None

    @property
    def verdict(self) -> str | None:
        return None if self.judge is None else f"jump {self.judge}"

    @property
    def upload_bytes_per_second(self) -> int | None:
        rate = self.policy.upload_kbit_per_second
        return None if rate is None else rate * _BYTES_PER_KBIT

    @property
    def chain_rules(self) -> list[str]:
        """In nft's own writing, so that they can be found again in a listing."""
        to, egress = "ct original ip daddr", self.policy.egress
        if len(egress.networks) <= _INLINE_NETWORKS:
            found = [f"{to} {network_text(network)} goto open" for network in egress.networks]
        else:
            found = [f"{to} {{ {', '.join(map(network_text, egress.networks))} }} goto open"]
        if egress.mode is EgressMode.ALL:
            found.append(f"{to} @public_addresses goto open")
        elif egress.domains:
            found.append(f"{to} @public_addresses ct original ip saddr . {to} @names goto open")
        return found


@dataclass(frozen=True, slots=True)
class Carried:
    """What a reload carries over. ``opened``: seconds for which (guest, address) is open still, because a name led there;
    ``refused``: (packets, bytes) of each guest."""

    opened: Mapping[tuple[IPv4Address, IPv4Address], int]
    refused: Mapping[IPv4Address, tuple[int, int]]


def home_rules(names: NetworkNames, around: Surroundings, slots: Iterable[Slot], carried: Carried) -> str:
    hooks = _hooks_beside_others(names, around.plan) if around.uplink is None else _hooks(names, around)
    inet = f"""
table inet {names.table} {{
    set reachable {{
        type ipv4_addr
        flags interval
        elements = {{ {_all_but(around.never)} }}
    }}
    set public_addresses {{
        type ipv4_addr
        flags interval
        elements = {{ {_all_but(around.private)} }}
    }}
    map generation {{
        type ipv4_addr : mark
    }}
    set current {{
        type ipv4_addr . mark
    }}
    map egress {{
        type ipv4_addr : verdict
    }}
    set names {{
        type ipv4_addr . ipv4_addr
        flags timeout
    }}
    set refused {{
        type ipv4_addr
        counter
    }}
    set asking {{
        type ipv4_addr
        size {SLOT_COUNT + 1}
        flags dynamic,timeout
        timeout 10s
    }}
    set flows {{
        type ipv4_addr
        size {SLOT_COUNT + 1}
        flags dynamic
    }}
    chain open {{
        add @flows {{ ct original ip saddr ct count over {MAX_FLOWS} }} goto refuse
        ct mark set ct original ip saddr map @generation accept
    }}
    chain public {{
        ct original ip daddr @public_addresses goto open
    }}
    chain refuse {{
        ip saddr @refused
        drop
    }}
    chain leaving {{
        ip daddr != @reachable goto refuse
        ip saddr . ct mark @current accept
        ip saddr vmap @egress
        goto refuse
    }}
    chain entering {{
        ip daddr . ct mark @current accept
        ct original ip saddr vmap @egress
    }}
    chain ask {{
        update @asking {{ ip saddr limit rate over {_ASKING_PER_SECOND}/second burst {_ASKING_BURST} packets }} drop
    }}
{hooks}}}
table netdev {names.table} {{ }}
"""
    return (
        f"{_replaced('inet', names)}{_replaced('netdev', names)}{inet}"
        + "".join(_slot_text(names, slot, carried.refused.get(slot.address)) for slot in slots)
        + "".join(
            f"add element inet {names.table} names {{ {guest} . {address} timeout {seconds}s }}\n"
            for (guest, address), seconds in carried.opened.items()
        )
    )


def slot_chain(names: NetworkNames, slot: Slot) -> str:
    """The chain of its policy, which has to be there before ``slot_added`` or ``slot_changed``; empty if it needs none."""
    if slot.chain is None:
        return ""
    return f"table inet {names.table} {{ chain {slot.chain} {{ {'; '.join(slot.chain_rules)}; }}; }}\n"


def slot_added(names: NetworkNames, slot: Slot) -> list[RulesMessage]:
    """Of a slot that has no rules. What it says is what ``home_rules`` says of a slot."""
    counted = element_added(names.table, "refused", address_key(slot.address))
    return [counted, *_egress_added(names, slot), *_sending_added(names, slot)]


def slot_removed(names: NetworkNames, slot: Slot, opened: Iterable[IPv4Address]) -> list[RulesMessage]:
    """``opened``: addresses that may be open to it through names."""
    return [
        element_removed(names.table, "refused", address_key(slot.address)),
        *_egress_removed(names, slot),
        *_names_closed(names, slot.address, opened),
        *chain_absent("netdev", names.table, slot.tap),
    ]


def slot_changed(names: NetworkNames, before: Slot, after: Slot, closed: Iterable[IPv4Address]) -> list[RulesMessage]:
    """The policy of a slot on the same TAP and address. ``closed``: addresses that names have opened, and that the new
    policy does not leave open."""
    messages: list[RulesMessage] = []
    if before.generation != after.generation:
        messages += [*_egress_removed(names, before), *_egress_added(names, after)]
        messages += _names_closed(names, after.address, closed)
    if before.policy.upload_kbit_per_second != after.policy.upload_kbit_per_second:
        messages += [*chain_absent("netdev", names.table, before.tap), *_sending_added(names, after)]
    return messages


def names_opened(names: NetworkNames, guest: IPv4Address, seconds: Mapping[IPv4Address, int]) -> list[RulesMessage]:
    """Also where they are open already, for a shorter time."""
    messages = _names_closed(names, guest, seconds)
    for address, lasting in seconds.items():
        messages.append(element_added(names.table, "names", address_key(guest, address), seconds=lasting))
    return messages


def _hooks(names: NetworkNames, around: Surroundings) -> str:
    """Of a namespace in which there is nothing but ours."""
    return f"""    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{names.bridge}" oifname "{around.uplink}" goto leaving
        iifname "{around.uplink}" oifname "{names.bridge}" ct state established,related jump entering
        drop
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        {_questions(names, around.plan)} goto ask
        drop
    }}
    chain leave {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{around.uplink}" masquerade
    }}
"""


def _hooks_beside_others(names: NetworkNames, plan: AddressPlan) -> str:
    """Of the host's own namespace: nothing is said of what neither comes from the bridge nor goes there."""
    bridge = names.bridge
    return f"""    chain from_guests {{
        type filter hook prerouting priority mangle; policy accept;
        {_questions(names, plan)} goto ask
        iifname "{bridge}" fib daddr type != unicast drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{bridge}" oifname != "{bridge}" goto leaving
        iifname != "{bridge}" oifname "{bridge}" ct state established,related jump entering
        oifname "{bridge}" drop
    }}
    chain to_guests {{
        type filter hook output priority filter; policy accept;
        oifname "{bridge}" ct state new drop
    }}
    chain leave {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {plan.subnet} oifname != "{bridge}" masquerade
    }}
"""


def _questions(names: NetworkNames, plan: AddressPlan) -> str:
    """Guests' questions for names, to the resolver."""
    return f'iifname "{names.bridge}" ip daddr {plan.gateway} meta l4proto {{ tcp, udp }} th dport 53'


def host_rules(names: NetworkNames, plan: AddressPlan) -> str:
    """Nothing that guests send is for the host, not even at an address that it has only just got. Said before the host's
    own translations: a port that it publishes by one (as Docker does) is a port of the host's."""
    link, source = names.uplink_host, plan.uplink_home
    return f"""{_replaced("inet", names)}
table inet {names.table} {{
    chain from_guests {{
        type filter hook prerouting priority mangle; policy accept;
        iifname "{link}" fib daddr type != unicast drop
    }}
    chain leave {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {source} oifname != "{link}" masquerade
    }}
}}
"""


def absent_rules(names: NetworkNames, *families: str) -> str:
    return "".join(_replaced(family, names) for family in families)


def network_text(network: IPv4Network) -> str:
    """As nft writes it."""
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)


def _replaced(family: str, names: NetworkNames) -> str:
    # Made first, so that deleting it never fails. Source: nft(8), "atomic rule replacement".
    return f"table {family} {names.table}\ndelete table {family} {names.table}\n"


def _all_but(networks: Iterable[IPv4Network]) -> str:
    """As ranges of addresses."""
    ranges: list[str] = []
    begin = 0
    for network in (*sorted(networks), None):
        end = int(network.network_address) if network is not None else 1 << 32
        if end > begin:
            first, last = IPv4Address(begin), IPv4Address(end - 1)
            ranges.append(str(first) if first == last else f"{first}-{last}")
        if network is not None:
            begin = max(begin, int(network.broadcast_address) + 1)
    return ", ".join(ranges)


def _slot_text(names: NetworkNames, slot: Slot, refused: tuple[int, int] | None) -> str:
    """What comes out of the TAP: IPv4 and ARP from its own addresses. No other type of frame passes, VLAN tags and IPv6
    included, nor DHCP (whose client has no address yet)."""
    table, mac, address = names.table, slot.mac_address, slot.address
    packets, octets = refused or (0, 0)
    limit = ""
    if slot.upload_bytes_per_second is not None:
        rate = f"{slot.upload_bytes_per_second} bytes/second burst {_UPLOAD_BURST_BYTES} bytes"
        limit = f"\n        meta protocol ip limit rate over {rate} drop"
    judged = f"add element inet {table} egress {{ {address} : {slot.verdict} }}\n" if slot.verdict else ""
    return f"""{slot_chain(names, slot)}add element inet {table} refused {{ {address} counter packets {packets} bytes {octets} }}
add element inet {table} generation {{ {address} : {slot.mark} }}
add element inet {table} current {{ {address} . {slot.mark} }}
{judged}table netdev {table} {{
    chain {slot.tap} {{
        type filter hook ingress device "{slot.tap}" priority {_INGRESS_PRIORITY}; policy accept;{limit}
        ether saddr {mac} ether type ip ip saddr {address} accept
        ether saddr {mac} ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether {mac} arp saddr ip {address} accept
        drop
    }}
}}
"""


def _sending_added(names: NetworkNames, slot: Slot) -> Iterator[RulesMessage]:
    """As in ``_slot_text``."""
    mac, address = bytes.fromhex(slot.mac_address.replace(":", "")), slot.address.packed
    yield ingress_chain_added(names.table, slot.tap, slot.tap, _INGRESS_PRIORITY)
    if slot.upload_bytes_per_second is not None:
        limited = [*is_protocol(_IPV4), *is_beyond(slot.upload_bytes_per_second, _UPLOAD_BURST_BYTES), *drop()]
        yield rule_added("netdev", names.table, slot.tap, limited)
    own_packet = [*link_header_is(6, mac + struct.pack("!H", _IPV4)), *network_header_is(12, address)]
    own_arp = [
        *link_header_is(6, mac + struct.pack("!H", _ARP)),
        *network_header_is(0, struct.pack("!HH", 1, _IPV4)),
        *network_header_is(4, bytes([6, 4])),
        *network_header_is(8, mac + address),
    ]
    for sent in (own_packet, own_arp):
        yield rule_added("netdev", names.table, slot.tap, [*is_ethernet(), *sent, *accept()])
    yield rule_added("netdev", names.table, slot.tap, drop())


def _egress_added(names: NetworkNames, slot: Slot) -> Iterator[RulesMessage]:
    key = address_key(slot.address)
    yield element_added(names.table, "generation", key, mark=slot.generation)
    yield element_added(names.table, "current", address_key(slot.address, slot.generation))
    if slot.judge is not None:
        yield element_added(names.table, "egress", key, jump_to=slot.judge)


def _egress_removed(names: NetworkNames, slot: Slot) -> Iterator[RulesMessage]:
    key = address_key(slot.address)
    yield element_removed(names.table, "generation", key)
    yield element_removed(names.table, "current", address_key(slot.address, slot.generation))
    if slot.judge is not None:
        yield element_removed(names.table, "egress", key)
    if slot.chain is not None:
        yield from chain_absent("inet", names.table, slot.chain)


def _names_closed(names: NetworkNames, guest: IPv4Address, addresses: Iterable[IPv4Address]) -> list[RulesMessage]:
    messages: list[RulesMessage] = []
    for address in addresses:
        key = address_key(guest, address)
        # Made first: it may have run out.
        messages.append(element_added(names.table, "names", key, seconds=60))
        messages.append(element_removed(names.table, "names", key))
    return messages
