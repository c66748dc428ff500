"""A stage for packets that a sandbox may try: its guests, and the ears that hear what arrives where.

Every packet carries a mark of its own, so that what is heard is counted by the packet and not by the luck of the moment.
Used by ``packet_table`` and what tries it.
"""

from __future__ import annotations

import os
import random
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests import network_frames as frames
from tests.network_frames import BROADCAST, arp, ethernet, icmp, ipv4, tcp_syn, udp
from tests.network_lab import (
    BRIDGE,
    INTERNET,
    PUBLISHED_PORT,
    Home,
    NetworkLab,
)

from atelier.model.machine import NetworkAttachment

_OFFLOAD_HEADER = bytes(10)
_PACKET_OUTGOING = 4
LISTENING_PORT = 7777
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
        self.gateway_mac = self._find_gateway(self.guest)
        self.seat(self.guest, self.neighbour)
        self._find_way_out()

    def seat(self, guest: Guest, neighbour: Guest) -> None:
        """Others than those whom it was opened with."""
        self.guest, self.neighbour = guest, neighbour
        self.ears |= {"neighbour": neighbour, "self": guest}
        for each in (guest, neighbour):
            self._find_gateway(each)

    @property
    def mark(self) -> bytes:
        return b"mark-%08d" % self.number

    @property
    def port(self) -> int:
        """The source port of the packet, so that an answer is known by it."""
        return _FIRST_PORT + self.number % _PORTS

    def _find_way_out(self) -> None:
        """By the neighbour, whom the internet is open to. The kernel lets a link send only once it has been told of its
        carrier, later than who made it: until then a first packet is lost on the way."""
        mark = b"a way out"
        deadline = time.monotonic() + _FENCE_SECONDS
        while not any(mark in frame for frame in self.neighbour.receive()):
            assert time.monotonic() < deadline, "the internet does not answer"
            # Of another identifier each time: pasta keeps back the second answer to the same ping.
            echo = ipv4(self.neighbour.address, INTERNET, frames.ICMP, icmp(8, random.randrange(1 << 16), mark))
            self.neighbour.send(ethernet(self.gateway_mac, self.neighbour.mac, frames.IPV4, echo))
            select.select([self.neighbour.descriptor], [], [], 0.1)

    def _find_gateway(self, guest: Guest) -> str:
        request = arp(1, guest.mac, guest.address, "00:00:00:00:00:00", guest.gateway)
        deadline = time.monotonic() + _FENCE_SECONDS
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
            self.wait_through()
        settled = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < settled:
            self.listen()
            time.sleep(_LOOK_SECONDS)

    def wait_through(self) -> None:
        """Until all that the guest has sent so far is through or lost, and what came to the guests has been told: packets
        keep their order on each way, so these come after them."""
        out, back = self._next_fence(), self._next_fence()
        # A ping, as pasta keeps a datagram back whose last one to the same port was refused.
        echo = ipv4(self.guest.address, INTERNET, frames.ICMP, icmp(8, 9, out))
        self._hear(out, {"internet"}, lambda: self.guest.send(self.to_gateway(echo)))
        self._hear(back, {"self", "neighbour"}, lambda: self._send_from_bridge(back))

    def _send_from_bridge(self, content: bytes) -> None:
        bridge = self.ears["bridge"]
        assert isinstance(bridge, PacketEar)
        for guest in (self.guest, self.neighbour):
            packet = ipv4(INTERNET, guest.address, frames.UDP, udp(9, 9, content))
            bridge.send(ethernet(guest.mac, self.gateway_mac, frames.IPV4, packet))

    def _next_fence(self) -> bytes:
        self.fences += 1
        return b"fence-%08d" % self.fences

    def _hear(self, fence: bytes, where: set[str], send: Callable[[], None]) -> None:
        """Sent again each second: a link that has just come up may lose one."""
        begun, sent = time.monotonic(), 0
        while missing := {name for name in where if (fence, name) not in self.fences_heard}:
            waited = time.monotonic() - begun
            assert waited < _FENCE_SECONDS, f"what must pass was not heard at {missing}"
            if waited >= sent:
                send()
                sent += 1
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
