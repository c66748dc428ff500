"""The packets that a sandbox may try, each with where it may arrive; and the ears that hear them.

Every packet carries a mark of its own, so that what is heard is counted by the packet and not by the luck of the moment.
Used by ``test_network_packets``.
"""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from tests import network_frames as frames
from tests.network_frames import BROADCAST, arp, ethernet, icmp, icmpv6, ipv4, ipv6, tcp_syn, udp
from tests.network_lab import (
    BRIDGE,
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
    NetworkLab,
)

from atelier.model.machine import NetworkAttachment

_OFFLOAD_HEADER = bytes(10)
_SCTP = 132
"""Its ports stand where those of UDP and TCP do."""
_PACKET_OUTGOING = 4
LISTENING_PORT = 7777
_ANSWERING_PORT = 7778
"""Another, so that no other row's packet comes to who answers, late as it may be."""
_FIRST_PORT, _PORTS = 20000, 40000
_MARK, _FENCE = re.compile(rb"mark-(\d{8})"), re.compile(rb"fence-\d{8}")
_ARRIVES_SECONDS = 2.0
_ARRIVES_SOON_SECONDS = 0.5
_SETTLE_SECONDS = 0.1
_LOOK_SECONDS = 0.002
_FENCE_SECONDS = 30.0


class Guest:
    """A card at the end of a TAP. It answers who asks for its address, as a kernel would."""

    def __init__(self, descriptor: int, attachment: NetworkAttachment) -> None:
        assert attachment.guest is not None
        self.descriptor = descriptor
        self.mac = attachment.mac_address
        self.address = attachment.guest.address
        self.gateway = attachment.guest.gateway
        os.set_blocking(descriptor, False)

    def send(self, frame: bytes) -> None:
        os.write(self.descriptor, _OFFLOAD_HEADER + frame)

    def receive(self) -> list[bytes]:
        found: list[bytes] = []
        while True:
            try:
                frame = os.read(self.descriptor, 65536)[len(_OFFLOAD_HEADER) :]
            except BlockingIOError:
                return found
            found.append(frame)
            asked = socket.inet_aton(self.address)
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == asked:
                sender_mac, sender = frame[22:28].hex(":"), socket.inet_ntoa(frame[28:32])
                self.send(
                    ethernet(sender_mac, self.mac, frames.ARP, arp(2, self.mac, self.address, sender_mac, sender))
                )


class PacketEar:
    """Hears all that a link receives, before any rule but those of an earlier link."""

    def __init__(self, link: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind((link, 0))
        self._socket.setblocking(False)

    def receive(self) -> list[bytes]:
        found: list[bytes] = []
        while True:
            try:
                frame, origin = self._socket.recvfrom(65536)
            except BlockingIOError:
                return found
            if origin[2] != _PACKET_OUTGOING:
                found.append(frame)

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def close(self) -> None:
        self._socket.close()


class PortEar:
    """A program that listens on every address of its namespace, v4 and v6."""

    def __init__(self, *ports: int) -> None:
        self._sockets: list[socket.socket] = []
        for port in ports:
            listening = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listening.bind(("::", port))
            listening.setblocking(False)
            self._sockets.append(listening)

    def receive(self) -> list[bytes]:
        found: list[bytes] = []
        for listening in self._sockets:
            while True:
                try:
                    found.append(listening.recv(65536))
                except BlockingIOError:
                    break
        return found

    def close(self) -> None:
        for listening in self._sockets:
            listening.close()


@dataclass
class Stage:
    """Two guests on their slots, and ears: ``neighbour`` (the other guest), ``bridge`` (the bridge's own link), ``home``
    and ``host`` (programs there), ``internet``, and ``self`` (answers)."""

    lab: NetworkLab
    guest: Guest
    neighbour: Guest
    gateway_mac: str = ""
    number: int = 0
    """Of the last packet; each has its own."""
    fenced: bool = False
    """Whether packets are followed by others on every way that they could take: real guests are far away."""
    asked: dict[tuple[str, int], int] = field(default_factory=dict)
    """Numbers of packets, by where their TCP connections go: pasta makes them anew, without the mark."""
    heard: Counter[tuple[int, str]] = field(default_factory=Counter)
    """How often a packet of this number, or an answer to it, was heard there."""
    fences: int = 0
    fences_heard: set[tuple[bytes, str]] = field(default_factory=set)
    ears: dict[str, Guest | PacketEar | PortEar] = field(default_factory=dict)

    def open(self, stack: ExitStack) -> None:
        with self.lab.inside("home"):
            self.ears["bridge"] = PacketEar(BRIDGE)
            if self.lab.home is not Home.HOST:
                self.ears["home"] = PortEar(LISTENING_PORT)
        with self.lab.inside("host"):
            self.ears["host"] = PortEar(LISTENING_PORT, PUBLISHED_PORT)
        with self.lab.inside("internet"):
            self.ears["internet"] = PacketEar("eth0")
        for ear in list(self.ears.values()):
            stack.callback(ear.close)  # type: ignore[union-attr]
        self.ears |= {"neighbour": self.neighbour, "self": self.guest}
        self.gateway_mac = self._find_gateway(self.guest)
        self._find_gateway(self.neighbour)

    @property
    def mark(self) -> bytes:
        return b"mark-%08d" % self.number

    @property
    def port(self) -> int:
        """The source port of the packet, so that an answer is known by it."""
        return _FIRST_PORT + self.number % _PORTS

    def _find_gateway(self, guest: Guest) -> str:
        request = arp(1, guest.mac, guest.address, "00:00:00:00:00:00", guest.gateway)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            # Nothing is forwarded before the link has found out that it has a carrier.
            guest.send(ethernet(BROADCAST, guest.mac, frames.ARP, request))
            select.select([guest.descriptor], [], [], 0.1)
            for frame in guest.receive():
                if frame[12:14] == b"\x08\x06" and frame[28:32] == socket.inet_aton(guest.gateway):
                    return frame[22:28].hex(":")
        raise AssertionError("the gateway does not answer")

    # --- packets of the guest's ---

    def to_gateway(self, payload: bytes, *, source_mac: str = "") -> bytes:
        return ethernet(self.gateway_mac, source_mac or self.guest.mac, frames.IPV4, payload)

    def udp_to(self, destination: str, port: int = LISTENING_PORT, *, source: str = "") -> bytes:
        return ipv4(source or self.guest.address, destination, frames.UDP, udp(self.port, port, self.mark))

    def syn_to(self, destination: str, port: int = LISTENING_PORT) -> bytes:
        source = self.guest.address
        self.asked[destination, port] = self.number
        return ipv4(source, destination, frames.TCP, tcp_syn(source, destination, self.port, port, self.mark))

    def ping(self, destination: str, kind: int = 8) -> bytes:
        return ipv4(self.guest.address, destination, frames.ICMP, icmp(kind, self.port, self.mark))

    # --- hearing ---

    def listen(self) -> None:
        for name, ear in self.ears.items():
            for frame in ear.receive():
                self.heard.update((number, name) for number in self._numbers_of(frame, name))
                self.fences_heard |= {(fence, name) for fence in _FENCE.findall(frame)}

    def _numbers_of(self, frame: bytes, name: str) -> set[int]:
        found = {int(digits) for digits in _MARK.findall(frame)}
        if name == "self" and (port := frames.destination_port(frame) or 0) >= _FIRST_PORT:
            found.add(self.number - (self.number - port + _FIRST_PORT) % _PORTS)
        if name == "internet" and (asked := frames.asked_for(frame)) in self.asked:
            found.add(self.asked[asked])
        return found

    def settle(self) -> None:
        """Until all that was sent so far has come as far as it gets."""
        if self.fenced:
            self._wait_through()
        settled = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < settled:
            self.listen()
            time.sleep(_LOOK_SECONDS)

    def _wait_through(self) -> None:
        """Until all that the guest has sent so far is through or lost, and what came to the guests has been told: packets
        keep their order on each way, so these come after them."""
        out, back = self._next_fence(), self._next_fence()
        # A ping, as pasta keeps a datagram back whose last one to the same port was refused.
        echo = ipv4(self.guest.address, INTERNET, frames.ICMP, icmp(8, 9, out))
        self.guest.send(self.to_gateway(echo))
        self._hear(out, "internet")
        bridge = self.ears["bridge"]
        assert isinstance(bridge, PacketEar)
        for guest in (self.guest, self.neighbour):
            packet = ipv4(INTERNET, guest.address, frames.UDP, udp(9, 9, back))
            bridge.send(ethernet(guest.mac, self.gateway_mac, frames.IPV4, packet))
        self._hear(back, "self")
        self._hear(back, "neighbour")

    def _next_fence(self) -> bytes:
        self.fences += 1
        return b"fence-%08d" % self.fences

    def _hear(self, fence: bytes, where: str) -> None:
        deadline = time.monotonic() + _FENCE_SECONDS
        while (fence, where) not in self.fences_heard:
            assert time.monotonic() < deadline, f"what must pass was not heard at {where}"
            self.listen()
            time.sleep(_LOOK_SECONDS)


Send = Callable[[Stage], None]


@dataclass(frozen=True)
class Row:
    name: str
    send: Send
    arrives: frozenset[str] = frozenset()
    may_arrive: frozenset[str] = frozenset({"bridge"})
    """Not counted: that a packet comes as far as the bridge is no harm where the rules behind it are what is tried."""
    by_holder: bool = False
    """Whether it is the holder that lets it arrive: the holder answers, that the question was no message of DNS's."""

    with_pasta: frozenset[str] | None = None
    """Where it arrives when pasta is the way out, if that differs: it tells guests of no refused datagram, and sends what is
    too large in pieces."""
    homes: frozenset[Home] = frozenset(Home)
    """Where it is tried."""

    def arrives_in(self, home: Home) -> frozenset[str]:
        return self.arrives if self.with_pasta is None or home is not Home.USER else self.with_pasta


def try_row(stage: Stage, row: Row) -> str:
    """Send it, and say what is wrong; empty if nothing is."""
    return "".join(try_rows(stage, [row]))


def try_rows(stage: Stage, rows: Iterable[Row], *, stop_at_first: bool = False) -> list[str]:
    """Send them one after the other, then listen, and say what is wrong. ``stop_at_first``: something is expected to be, so
    what has not come soon is not waited for."""
    stage.listen()
    stage.heard.clear()
    stage.asked.clear()
    sent: dict[int, Row] = {}
    for row in rows:
        stage.number += 1
        sent[stage.number] = row
        row.send(stage)
        # Ears hold only so much.
        stage.listen()
    stage.settle()
    deadline = time.monotonic() + (_ARRIVES_SOON_SECONDS if stop_at_first else _ARRIVES_SECONDS)
    while True:
        stage.listen()
        stray = {number: _heard_wrongly(stage, number, row) for number, row in sent.items()}
        missing = {number: _not_heard(stage, number, row) for number, row in sent.items()}
        if not any(missing.values()) or (stop_at_first and any(stray.values())) or time.monotonic() > deadline:
            break
        time.sleep(_LOOK_SECONDS)
    found: list[str] = []
    for number, row in sent.items():
        said = [f"heard {', '.join(stray[number])}"] if stray[number] else []
        said += [f"not heard at {', '.join(missing[number])}"] if missing[number] else []
        found += [f"{row.name}: {'; '.join(said)}"] if said else []
    return found


def _heard_wrongly(stage: Stage, number: int, row: Row) -> list[str]:
    right = row.arrives_in(stage.lab.home) | row.may_arrive
    counts = {name: stage.heard[number, name] for name in sorted(stage.ears) if name not in right}
    return [f"{count} at {name}" for name, count in counts.items() if count]


def _not_heard(stage: Stage, number: int, row: Row) -> list[str]:
    return sorted(name for name in row.arrives_in(stage.lab.home) if not stage.heard[number, name])


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
