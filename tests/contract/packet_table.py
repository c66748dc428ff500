"""The packets that a sandbox may try, each with where it may arrive. Used by ``test_network_packets`` and others."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from tests import network_frames as frames
from tests.contract.packet_stage import LISTENING_PORT, PacketEar, Row, Send, Stage, try_rows
from tests.network_frames import BROADCAST, arp, ethernet, icmpv6, ipv4, ipv6, udp
from tests.network_lab import (
    FRESH_HOST_ADDRESS,
    HOST_ADDRESS,
    HOST_ADDRESS_V6,
    INTERNET,
    METADATA,
    NEIGHBOUR_OF_HOST,
    OTHER_HOST_ADDRESS,
    PRIVATE,
    PUBLISHED_PORT,
    Home,
)

_SCTP = 132
"""Its ports stand where those of UDP and TCP do."""
_ANSWERING_PORT = 7778
"""Another, so that no other row's packet comes to who answers, late as it may be."""


def try_table(stage: Stage, *, stop_at_first: bool = False, holder_asleep: bool = False) -> list[str]:
    rows = [row for row in TABLE if stage.lab.home in row.homes and not (row.by_holder and holder_asleep)]
    if stop_at_first and (found := try_rows(stage, rows[:_PLAIN_ROWS], stop_at_first=True)):
        return found
    return try_rows(stage, rows, stop_at_first=stop_at_first)


def _guest(make: Callable[[Stage], bytes]) -> Send:
    return lambda stage: stage.guest.send(make(stage))


def routed(make: Callable[[Stage], bytes]) -> Send:
    """An IPv4 packet, to the gateway's MAC address."""
    return lambda stage: stage.guest.send(stage.to_gateway(make(stage)))


def _neighbourly(make: Callable[[Stage], bytes], destination: str = "") -> Send:
    """An IPv4 packet, straight to the neighbour's MAC address."""
    return _guest(lambda s: ethernet(destination or s.neighbour.mac, s.guest.mac, frames.IPV4, make(s)))


def _arp(sender_mac: str, sender: str, *, source: str = "guest", operation: int = 2, to: str = BROADCAST) -> Send:
    """Names stand for the addresses of ``guest``, ``neighbour`` and ``gateway``."""

    def send(stage: Stage) -> None:
        macs = {"guest": stage.guest.mac, "neighbour": stage.neighbour.mac, "gateway": stage.gateway_mac}
        addresses = {
            "guest": stage.guest.address,
            "neighbour": stage.neighbour.address,
            "gateway": stage.guest.gateway,
            "nobody": "0.0.0.0",
        }
        target_mac, target = stage.neighbour.mac, stage.neighbour.address
        packet = arp(operation, macs[sender_mac], addresses[sender], target_mac, target, stage.mark)
        stage.guest.send(ethernet(macs.get(to, to), macs[source], frames.ARP, packet))

    return send


def _from_host(stage: Stage) -> None:
    """A program of the host's that knows of the guests. (To an ordinary user's home there is no route.)"""
    plan = stage.lab.plan
    router = str(plan.uplink_home) if stage.lab.home is Home.ROOT else NEIGHBOUR_OF_HOST
    beside = stage.lab.home is Home.HOST
    if not beside:
        stage.lab.in_host("ip", "route", "replace", str(plan.subnet), "via", router)
    try:
        with (
            stage.lab.inside("host"),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
            suppress(PermissionError),
        ):
            sender.sendto(stage.mark, (stage.guest.address, 9))
    finally:
        if not beside:
            stage.lab.in_host("ip", "route", "del", str(plan.subnet))


def _from_neighbour_of_host(stage: Stage) -> None:
    """Somebody on the host's network, who has it for a router to the guests."""
    subnet = str(stage.lab.plan.subnet)
    stage.lab.in_internet("ip", "route", "replace", subnet, "via", HOST_ADDRESS)
    try:
        with stage.lab.inside("internet"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(stage.mark, (stage.guest.address, 9))
    finally:
        stage.lab.in_internet("ip", "route", "del", subnet)


def _to_fresh_address(stage: Stage) -> None:
    """To the host, before the holder has noticed that it has this address."""
    stage.lab.in_host("ip", "address", "add", f"{FRESH_HOST_ADDRESS}/32", "dev", "lo")
    try:
        stage.guest.send(stage.to_gateway(stage.udp_to(FRESH_HOST_ADDRESS)))
        stage.settle()
    finally:
        stage.lab.in_host("ip", "address", "del", f"{FRESH_HOST_ADDRESS}/32", "dev", "lo")


def _from_bridge(destination: str) -> Send:
    """The gateway's answer to a guest: ``guest`` is there, ``gone`` is not any more."""

    def send(stage: Stage) -> None:
        to = stage.guest.mac if destination == "guest" else "02:00:00:00:99:99"
        packet = ipv4(INTERNET, stage.guest.address, frames.UDP, udp(9, 9, stage.mark))
        bridge = stage.ears["bridge"]
        assert isinstance(bridge, PacketEar)
        bridge.send(ethernet(to, stage.gateway_mac, frames.IPV4, packet))

    return send


def _answered_late(stage: Stage) -> None:
    """By a program there, which hears of the neighbour too before it answers the guest."""
    guests = ((stage.guest, stage.mark), (stage.neighbour, b"the neighbour's"))
    with stage.lab.inside("internet"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
        program.bind((INTERNET, _ANSWERING_PORT))
        program.settimeout(5)
        heard: list[tuple[str, int]] = []
        for guest, content in guests:
            packet = ipv4(guest.address, INTERNET, frames.UDP, udp(stage.port, _ANSWERING_PORT, content))
            guest.send(ethernet(stage.gateway_mac, guest.mac, frames.IPV4, packet))
            with suppress(TimeoutError):
                heard.append(program.recvfrom(2000)[1])
        # There is no way back to an address that was not translated.
        with suppress(OSError):
            for address in heard[:1]:
                program.sendto(stage.mark, address)


def _too_large(stage: Stage) -> bytes:
    """Larger than the host's way to the internet takes; the guest has to hear of it, or its connections would hang."""
    content = udp(stage.port, 9, stage.mark + bytes(1420))
    return ipv4(stage.guest.address, INTERNET, frames.UDP, content, fragment=frames.DO_NOT_FRAGMENT)


def _odd_arp(hardware: int = 1, protocol: int = frames.IPV4, lengths: tuple[int, int] = (6, 4)) -> Send:
    """ARP of another kind than Ethernet's for IPv4, with the guest's own addresses where they would be."""

    def send(stage: Stage) -> None:
        packet = arp(1, stage.guest.mac, stage.guest.address, BROADCAST, stage.guest.gateway, stage.mark)
        head = struct.pack("!HHBB", hardware, protocol, *lengths)
        stage.guest.send(ethernet(BROADCAST, stage.guest.mac, frames.ARP, head + packet[6:]))

    return send


_LINK_LOCAL, _ALL_NODES, _NEIGHBOUR_V6 = "fe80::1", "ff02::1", "fe80::2"
_ALL_NODES_MAC = "33:33:00:00:00:01"
_NOTHING: frozenset[str] = frozenset()


def _forged(name: str, send: Send) -> Row:
    """A frame that must not even reach the bridge."""
    return Row(name, send, may_arrive=_NOTHING)


_PLAIN_ROWS = 3
"""The first ones: where they do not arrive, the others wait for answers in vain."""

TABLE: tuple[Row, ...] = (
    # What must pass, or the rest would prove nothing.
    Row("UDP to the internet, and its refusal", routed(lambda s: s.udp_to(INTERNET)), frozenset({"internet", "self"}), with_pasta=frozenset({"internet"})),
    Row("TCP to the internet, and its answer", routed(lambda s: s.syn_to(INTERNET)), frozenset({"internet", "self"})),
    Row("ping of the internet, and its answer", routed(lambda s: s.ping(INTERNET)), frozenset({"internet", "self"})),
    Row("the answer to one guest after another has spoken", _answered_late, frozenset({"internet", "self"})),
    Row("a name over UDP", routed(lambda s: s.udp_to(s.guest.gateway, 53)), frozenset({"self"}), by_holder=True),
    Row("a name over TCP", routed(lambda s: s.syn_to(s.guest.gateway, 53)), frozenset({"self"})),
    Row("a name asked of the host, over UDP", routed(lambda s: s.udp_to(HOST_ADDRESS, 53))),
    Row("a name asked of the host, over TCP", routed(lambda s: s.syn_to(HOST_ADDRESS, 53))),
    Row("port 53 of another protocol", routed(lambda s: ipv4(s.guest.address, s.guest.gateway, _SCTP, udp(s.port, 53, s.mark)))),
    Row("the gateway's answer", _from_bridge("guest"), frozenset({"self"})),
    Row("too large a packet, and the host's word of it", routed(_too_large), frozenset({"self"}), with_pasta=frozenset({"internet"})),
    # From guest to guest.
    Row("ping of the neighbour", _neighbourly(lambda s: s.ping(s.neighbour.address))),
    Row("TCP to the neighbour", _neighbourly(lambda s: s.syn_to(s.neighbour.address))),
    Row("UDP to the neighbour", _neighbourly(lambda s: s.udp_to(s.neighbour.address))),
    Row("UDP broadcast", _neighbourly(lambda s: s.udp_to("255.255.255.255"), BROADCAST)),
    Row("UDP to the subnet's broadcast address", _neighbourly(lambda s: s.udp_to(str(s.lab.plan.subnet[-1])), BROADCAST)),
    Row("UDP multicast", _neighbourly(lambda s: s.udp_to("224.0.0.251", 5353), "01:00:5e:00:00:fb")),
    Row("ARP question to all", _arp("guest", "guest", operation=1), frozenset({"bridge"})),
    Row("ARP question to the neighbour", _arp("guest", "guest", operation=1, to="neighbour")),
    Row("a DHCP offer to all", _neighbourly(lambda s: ipv4(s.guest.address, "255.255.255.255", frames.UDP, udp(67, 68, s.mark)), BROADCAST)),
    Row("a DHCP offer to the neighbour", _neighbourly(lambda s: ipv4(s.guest.address, s.neighbour.address, frames.UDP, udp(67, 68, s.mark)))),
    Row("UDP to the neighbour by the gateway", routed(lambda s: s.udp_to(s.neighbour.address))),
    Row("TCP to the neighbour by the gateway", routed(lambda s: s.syn_to(s.neighbour.address))),
    Row("ping of the neighbour by the gateway", routed(lambda s: s.ping(s.neighbour.address))),
    Row("the gateway's answer to a guest that is gone", _from_bridge("gone")),
    # Under another's name.
    _forged("ARP: the neighbour's address is mine", _arp("guest", "neighbour")),
    _forged("ARP: the gateway's address is mine", _arp("guest", "gateway")),
    _forged("ARP: the gateway's address is mine, to the neighbour", _arp("guest", "gateway", to="neighbour")),
    _forged("ARP: my address is the neighbour's MAC", _arp("neighbour", "guest")),
    _forged("ARP under the neighbour's MAC", _arp("neighbour", "neighbour", source="neighbour")),
    _forged("ARP of mine under the neighbour's MAC", _arp("guest", "guest", source="neighbour")),
    _forged("ARP under the gateway's MAC", _arp("gateway", "gateway", source="gateway")),
    _forged("ARP from no address", _arp("guest", "nobody", operation=1)),
    _forged("ARP of other hardware", _odd_arp(hardware=6)),
    _forged("ARP for another protocol", _odd_arp(protocol=frames.IPV6)),
    _forged("ARP with longer hardware addresses", _odd_arp(lengths=(8, 4))),
    _forged("ARP with longer addresses", _odd_arp(lengths=(6, 16))),
    _forged("a stolen MAC", _guest(lambda s: s.to_gateway(s.udp_to(INTERNET), source_mac=s.neighbour.mac))),
    _forged("the gateway's MAC", _guest(lambda s: s.to_gateway(s.udp_to(INTERNET), source_mac=s.gateway_mac))),
    _forged("a stolen address", routed(lambda s: s.udp_to(INTERNET, source=s.neighbour.address))),
    _forged("a stolen MAC and address", _guest(lambda s: s.to_gateway(s.udp_to(INTERNET, source=s.neighbour.address), source_mac=s.neighbour.mac))),
    _forged("the gateway's address", routed(lambda s: s.udp_to(INTERNET, source=s.guest.gateway))),
    _forged("a foreign address", routed(lambda s: s.udp_to(INTERNET, source="203.0.113.200"))),
    _forged("a DHCP question", _neighbourly(lambda s: ipv4("0.0.0.0", "255.255.255.255", frames.UDP, udp(68, 67, s.mark)), BROADCAST)),
    # Other kinds of frame.
    _forged("IPv6 to the neighbour", _guest(lambda s: ethernet(s.neighbour.mac, s.guest.mac, frames.IPV6, ipv6(_LINK_LOCAL, _NEIGHBOUR_V6, frames.UDP, udp(9, 9, s.mark))))),
    _forged("IPv6 ping of all nodes", _guest(lambda s: ethernet(_ALL_NODES_MAC, s.guest.mac, frames.IPV6, icmpv6(_LINK_LOCAL, _ALL_NODES, 128, bytes(4) + s.mark)))),
    _forged("IPv6 router advertisement", _guest(lambda s: ethernet(_ALL_NODES_MAC, s.guest.mac, frames.IPV6, icmpv6(_LINK_LOCAL, _ALL_NODES, 134, struct.pack("!BBHII", 64, 0, 1800, 0, 0) + s.mark)))),
    _forged("IPv6 to the gateway", _guest(lambda s: ethernet(s.gateway_mac, s.guest.mac, frames.IPV6, ipv6(_LINK_LOCAL, "2001:db8::9", frames.UDP, udp(9, 9, s.mark))))),
    _forged("a VLAN tag", _guest(lambda s: ethernet(s.gateway_mac, s.guest.mac, frames.VLAN, struct.pack("!HH", 7, frames.IPV4) + s.udp_to(INTERNET)))),
    _forged("a VLAN tag of number 0", _guest(lambda s: ethernet(s.gateway_mac, s.guest.mac, frames.VLAN, struct.pack("!HH", 0, frames.IPV4) + s.udp_to(INTERNET)))),
    _forged("a provider's VLAN tag", _guest(lambda s: ethernet(BROADCAST, s.guest.mac, frames.VLAN_OUTER, struct.pack("!HH", 7, frames.IPV4) + s.udp_to(INTERNET)))),
    _forged("reverse ARP", _guest(lambda s: ethernet(BROADCAST, s.guest.mac, frames.RARP, arp(3, s.guest.mac, s.guest.address, s.guest.mac, s.guest.address, s.mark)))),
    _forged("a frame of an unknown kind", _guest(lambda s: ethernet(BROADCAST, s.guest.mac, 0x88B5, s.mark))),
    # To the host.
    *(
        row
        for what, address in (
            ("the gateway", lambda s: s.guest.gateway),
            ("the home's end of the way out", lambda s: str(s.lab.plan.uplink_home)),
            ("the host's end of the way out", lambda s: str(s.lab.plan.uplink_host)),
            ("the host's address", lambda s: HOST_ADDRESS),
            ("the host's other address", lambda s: OTHER_HOST_ADDRESS),
            ("loopback", lambda s: "127.0.0.1"),
        )
        for row in (
            Row(f"UDP to {what}", routed(lambda s, address=address: s.udp_to(address(s)))),
            Row(f"TCP to {what}", routed(lambda s, address=address: s.syn_to(address(s)))),
            Row(f"ping of {what}", routed(lambda s, address=address: s.ping(address(s)))),
        )
    ),
    _forged("IPv6 to the host's address", _guest(lambda s: ethernet(s.gateway_mac, s.guest.mac, frames.IPV6, ipv6("2001:db8:9::9", HOST_ADDRESS_V6, frames.UDP, udp(s.port, LISTENING_PORT, s.mark))))),
    # An ordinary user's host has no rules of ours: there it takes as long as the kernel's word of it, which has a test.
    Row("an address that the host has just got", _to_fresh_address, homes=frozenset({Home.ROOT, Home.HOST})),
    Row("a port that the host publishes", routed(lambda s: s.udp_to(OTHER_HOST_ADDRESS, PUBLISHED_PORT))),
    # To what is private.
    Row("the metadata service", routed(lambda s: s.syn_to(METADATA, 80))),
    *(Row(f"the private network of {address}", routed(lambda s, address=address: s.udp_to(address))) for address in PRIVATE),
    Row("the host's own network", routed(lambda s: s.udp_to(NEIGHBOUR_OF_HOST))),
    Row("past the translation", routed(lambda s: s.ping(INTERNET, kind=0))),
    # From outside.
    Row("from the host's network to a guest", _from_neighbour_of_host, may_arrive=frozenset({"internet"})),
    Row("from the host to a guest", _from_host, may_arrive=frozenset({"bridge", "internet"})),
)  # fmt: skip
