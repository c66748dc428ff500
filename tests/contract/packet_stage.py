"""Two guests at the ends of their TAPs, the ears that hear what they send, and one packet after another.

Every packet carries a mark of its own, so that what is heard is counted by the packet and not by the luck of the moment.
Used by ``packet_table`` and whatever tries packets of its own.
"""

from __future__ import annotations

import os
import random
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
_ARRIVES_SECONDS = 2.0
SETTLE_SECONDS = 0.02
_FENCE_SECONDS = 30.0
_FENCE_AGAIN_SECONDS = 2.0
"""A fence proves as much when it is the second: every network may lose a packet."""


NOWHERE = ("0.0.0.0", 0)


def mark_of(number: int) -> bytes:
    """Of the packet of this number."""
    return b"mark-%08d" % number


def port_of(number: int) -> int:
    return 20000 + number % 40000


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
    fenced: bool = False
    """Whether each row's packet is followed by others on every way that it could take: real guests are far away."""
    fence: bytes = b""
    fences_heard: set[str] = field(default_factory=set)
    asked: tuple[str, int] = NOWHERE
    """Where the packet's TCP connection goes: pasta makes it anew, without the mark."""
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
        return mark_of(self.number)

    @property
    def port(self) -> int:
        """The source port of the packet, so that an answer is known by it."""
        return port_of(self.number)

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
        self.asked = destination, port
        return ipv4(source, destination, frames.TCP, tcp_syn(source, destination, self.port, port, self.mark))

    def ping(self, destination: str, kind: int = 8) -> bytes:
        return ipv4(self.guest.address, destination, frames.ICMP, icmp(kind, self.port, self.mark))

    # --- hearing ---

    def listen(self, *trials: Trial) -> None:
        for name, ear in self.ears.items():
            for frame in ear.receive():
                for trial in trials:
                    trial.heard[name] += trial.is_told_by(frame, name)
                if self.fence and self.fence in frame:
                    self.fences_heard.add(name)

    def wait_through(self, *trials: Trial) -> None:
        """Until all that the guest has sent so far is through or lost, and what came to the guests has been told: packets
        keep their order on each way, so these come after them."""
        self.fence = b"fence-%08d" % self.number
        # A ping, as pasta keeps a datagram back whose last one to the same port was refused.
        echo = ipv4(self.guest.address, INTERNET, frames.ICMP, icmp(8, 9, self.fence))
        self._hear_fences(trials, {"internet"}, lambda: self.guest.send(self.to_gateway(echo)))
        self._hear_fences(trials, {"self", "neighbour"}, self._send_fences)

    def _send_fences(self) -> None:
        bridge = self.ears["bridge"]
        assert isinstance(bridge, PacketEar)
        for guest in (self.guest, self.neighbour):
            packet = ipv4(INTERNET, guest.address, frames.UDP, udp(9, 9, self.fence))
            bridge.send(ethernet(guest.mac, self.gateway_mac, frames.IPV4, packet))

    def _hear_fences(self, trials: Iterable[Trial], where: set[str], send: Callable[[], None]) -> None:
        self.fences_heard.clear()
        deadline = time.monotonic() + _FENCE_SECONDS
        again_at = 0.0
        while not where <= self.fences_heard:
            assert time.monotonic() < deadline, f"what must pass was heard at {self.fences_heard} alone"
            if time.monotonic() >= again_at:
                send()
                again_at = time.monotonic() + _FENCE_AGAIN_SECONDS
            self.listen(*trials)
            time.sleep(0.002)


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


@dataclass
class Trial:
    """A row that was sent, and at how many packets of it each ear has heard."""

    row: Row
    number: int
    asked: tuple[str, int] = NOWHERE
    heard: Counter[str] = field(default_factory=Counter)

    def is_told_by(self, frame: bytes, ear: str) -> bool:
        return (
            mark_of(self.number) in frame
            or (ear == "self" and frames.answers_port(frame, port_of(self.number)))
            or (ear == "internet" and frames.asks_for(frame, *self.asked))
        )

    def missing(self, home: Home) -> list[str]:
        return sorted(name for name in self.row.arrives_in(home) if not self.heard[name])

    def wrong(self, home: Home) -> str:
        """Empty if nothing is."""
        right = self.row.arrives_in(home) | self.row.may_arrive
        wrong = sorted(f"{count} at {name}" for name, count in self.heard.items() if count and name not in right)
        said = [f"heard {', '.join(wrong)}"] if wrong else []
        said += [f"not heard at {', '.join(missing)}"] if (missing := self.missing(home)) else []
        return f"{self.row.name}: {'; '.join(said)}" if said else ""


def send_row(stage: Stage, row: Row) -> Trial:
    stage.number += 1
    stage.asked = NOWHERE
    row.send(stage)
    return Trial(row, stage.number, stage.asked)


def try_row(stage: Stage, row: Row) -> str:
    """Send it, and say what is wrong; empty if nothing is."""
    stage.listen()
    trial = send_row(stage, row)
    if stage.fenced:
        stage.wait_through(trial)
    deadline = time.monotonic() + _ARRIVES_SECONDS
    settled = time.monotonic() + SETTLE_SECONDS
    while True:
        stage.listen(trial)
        if time.monotonic() > (deadline if trial.missing(stage.lab.home) else settled):
            break
        time.sleep(0.002)
    return trial.wrong(stage.lab.home)
