"""The packet filter rules, as text for nftables. Pure. Every rule here is needed: a test takes one away at a time and
sees a packet pass that must not, or one kept back that must pass.

Two namespaces: the **home**, where the bridge is, and the **host**, which the home's traffic crosses on its way out. All
of a namespace's tables are replaced in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from atelier.model.address_plan import AddressPlan
from atelier.network_holder.names import NetworkNames

NEVER_REACHED = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, the metadata services of clouds among them
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
"""Private and special networks. To them come those that the host itself is connected to."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What a TAP may send from."""

    tap: str
    mac_address: str
    address: IPv4Address


def home_rules(
    names: NetworkNames,
    plan: AddressPlan,
    uplink: str,
    blocked: Iterable[IPv4Network],
    nameserver: IPv4Address | None,
    slots: Iterable[Slot],
) -> str:
    elements = ", ".join(sorted(str(network) for network in {*NEVER_REACHED, *blocked}))
    resolve = accept_resolved = ""
    if nameserver is not None:
        resolve = f"""
    chain resolve {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "{names.bridge}" ip daddr {plan.gateway} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {nameserver}
    }}"""
        accept_resolved = f'iifname "{names.bridge}" oifname "{uplink}" ct status dnat accept'
    inet = f"""
table inet {names.table} {{
    set blocked {{
        type ipv4_addr
        flags interval
        auto-merge
        elements = {{ {elements} }}
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        iifname "{uplink}" oifname "{names.bridge}" ct state established,related accept
        {accept_resolved}
        iifname "{names.bridge}" oifname "{uplink}" ip daddr != @blocked accept
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
    }}{resolve}
    chain leave {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{uplink}" masquerade
    }}
}}
"""
    chains = "".join(_slot_chain(slot) for slot in slots)
    return f"{_replaced('inet', names)}{_replaced('netdev', names)}{inet}table netdev {names.table} {{\n{chains}}}\n"


def slot_rules(names: NetworkNames, slot: Slot) -> str:
    """One slot's, replaced in one transaction."""
    return f"{slot_rules_absent(names, slot.tap)}table netdev {names.table} {{\n{_slot_chain(slot)}}}\n"


def slot_rules_absent(names: NetworkNames, *taps: str) -> str:
    """Also where there are none: some kernels take a chain away with its link, some leave it. All are named first, then
    deleted: in turns it takes nft five times as long."""
    named = " ".join(f"chain {tap} {{ }};" for tap in taps)
    deleted = "".join(f"delete chain netdev {names.table} {tap}\n" for tap in taps)
    return f"table netdev {names.table} {{ {named} }}\n{deleted}"


def host_rules(names: NetworkNames, plan: AddressPlan) -> str:
    """Before the host's own translations: a port that it publishes by one (as Docker does) is a port of the host's."""
    link, source = names.uplink_host, plan.uplink_home
    return f"""{_replaced("inet", names)}
table inet {names.table} {{
    chain from_guests {{
        type filter hook prerouting priority mangle; policy accept;
        iifname "{link}" ip saddr {source} fib daddr type unicast accept
        iifname "{link}" drop
    }}
    chain leave {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {source} oifname != "{link}" masquerade
    }}
}}
"""


def absent_rules(names: NetworkNames, *families: str) -> str:
    return "".join(_replaced(family, names) for family in families)


def _replaced(family: str, names: NetworkNames) -> str:
    # Made first, so that deleting it never fails. Source: nft(8), "atomic rule replacement".
    return f"table {family} {names.table}\ndelete table {family} {names.table}\n"


def _slot_chain(slot: Slot) -> str:
    """What comes out of the TAP: IPv4 and ARP from its own addresses. No other type of frame passes, VLAN tags and IPv6
    included, nor DHCP (whose client has no address yet)."""
    mac, address = slot.mac_address, slot.address
    return f"""    chain {slot.tap} {{
        type filter hook ingress device "{slot.tap}" priority -500; policy drop;
        ether saddr {mac} ether type ip ip saddr {address} accept
        ether saddr {mac} ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether {mac} arp saddr ip {address} accept
    }}
"""
