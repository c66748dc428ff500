"""Open flows between a guest and a server in the internet, and tables of what a guest reaches.

Used by ``test_network_policies``. A guest's end of a flow is packed by hand, as its frames are.
"""

from __future__ import annotations

import dataclasses
import re
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import IPv4Address

from tests import network_frames as frames
from tests.contract.packet_stage import Row, Stage, try_rows
from tests.contract.packet_table import routed
from tests.network_frames import ethernet, ipv4, tcp, udp
from tests.network_lab import (
    ELSEWHERE,
    HOST_ADDRESS,
    INSTALLATION,
    INTERNET,
    METADATA,
    NEIGHBOUR_OF_HOST,
    OTHER_HOST_ADDRESS,
    PRIVATE,
)

from atelier.network_holder.listings import parse_counters

_ARRIVES_SECONDS = 15.0
_JUDGED_SECONDS = 2.0
"""For what is tried with a rule missing, too, when it never arrives."""
_SETTLE_SECONDS = 0.1
_TCP_FIRST_NUMBER = 1000

PLACES = (INTERNET, ELSEWHERE, *PRIVATE, NEIGHBOUR_OF_HOST)
"""Servers that a policy may open; the last is in the host's own network."""


def reached_wrongly(stage: Stage, *places: str) -> list[str]:
    """What is wrong where the guest should reach these of PLACES, and nothing else."""
    plan = stage.lab.plan
    never = (METADATA, HOST_ADDRESS, OTHER_HOST_ADDRESS, "127.0.0.1", str(plan.gateway), str(plan.uplink_home))
    closed = [*never, str(plan.uplink_host), stage.neighbour.address, *(each for each in PLACES if each not in places)]
    rows = [row for address in closed for row in _rows(address, open=False)]
    return try_rows(stage, [*rows, *(row for address in places for row in _rows(address, open=True))])


def _rows(address: str, *, open: bool) -> list[Row]:
    arrives, may_arrive = ({"internet"}, {"bridge", "self"}) if open else ((), {"bridge"})
    return [
        Row(f"{what} to {address}", routed(make), frozenset(arrives), frozenset(may_arrive))
        for what, make in (
            ("UDP", lambda s: s.udp_to(address)),
            ("TCP", lambda s: s.syn_to(address)),
            ("ping", lambda s: s.ping(address)),
        )
    ]


def as_neighbour(stage: Stage) -> Stage:
    """The same stage, with the guests' parts exchanged."""
    ears = {**stage.ears, "self": stage.neighbour, "neighbour": stage.guest}
    return dataclasses.replace(
        stage, guest=stage.neighbour, neighbour=stage.guest, ears=ears, number=stage.number + 5000
    )


def try_judging(stage: Stage) -> list[str]:
    """What the rules do with flows that are open, and with what they refuse. While nobody puts back what is changed here
    by hand: the guest's current generation, and its verdict."""
    table, guest = f"atelier_{INSTALLATION}", stage.guest.address
    run = stage.lab.in_home
    wrong: list[str] = []
    with ExitStack() as stack:
        flow = UdpFlow(stage, stack, INTERNET, 5999)
        if not (flow.say() and is_open(flow)):
            return ["no flow can be opened"]
        run("nft", f"delete element inet {table} egress {{ {guest} }}")
        if not flow.say(_JUDGED_SECONDS):
            wrong.append("what a guest says on a flow of its current generation is judged again")
        if not flow.push(_JUDGED_SECONDS):
            wrong.append("what is said to a guest on a flow of its current generation is judged again")
        counted = _refused(stage)
        stage.guest.send(stage.to_gateway(stage.udp_to(INTERNET)))
        if not _wait(_JUDGED_SECONDS, lambda: _refused(stage) == counted + 1):
            wrong.append("what is refused is not counted")
        run("nft", f"add element inet {table} egress {{ {guest} : jump public }}")
        generation = re.search(rf"{guest} : (0x\w+)", run("nft", "list", "map", "inet", table, "generation"))
        assert generation is not None
        for kind, old, new in (("generation", "", ": 0x7"), ("current", f". {generation[1]}", ". 0x7")):
            run("nft", f"delete element inet {table} {kind} {{ {guest} {old} }}")
            run("nft", f"add element inet {table} {kind} {{ {guest} {new} }}")
        if not flow.push(_JUDGED_SECONDS):
            wrong.append("what is said to a guest on a flow that stays allowed has to wait for the guest")
    return wrong


def _refused(stage: Stage) -> int:
    listing = stage.lab.in_home("nft", "list", "set", "inet", f"atelier_{INSTALLATION}", "refused")
    return parse_counters(listing)[IPv4Address(stage.guest.address)][0]


class UdpFlow:
    """``say`` and ``push`` tell whether the other end has heard a word of the guest's, or of the server's."""

    def __init__(self, stage: Stage, stack: ExitStack, server: str, port: int) -> None:
        self._stage, self._guest, self._address, self._port = stage, stage.guest, server, port
        self._count = 0
        self._peer: tuple[str, int] | None = None
        with stage.lab.inside("internet"):
            self._server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._server.bind((server, port))
        self._server.setblocking(False)

    def say(self, within: float = _ARRIVES_SECONDS) -> bool:
        word = self._word()
        content = udp(self._port, self._port, word)
        packet = ipv4(self._guest.address, self._address, frames.UDP, content)
        self._guest.send(ethernet(self._stage.gateway_mac, self._guest.mac, frames.IPV4, packet))
        return _wait(within, lambda: self._hears(word))

    def move_to(self, stage: Stage) -> None:
        """Another guest goes on with it, under the same address."""
        assert stage.guest.address == self._guest.address
        self._stage, self._guest = stage, stage.guest

    def push(self, within: float = _ARRIVES_SECONDS) -> bool:
        assert self._peer is not None, "nothing was said yet"
        word = self._word()
        self._server.sendto(word, self._peer)
        return _wait(within, lambda: any(word in frame for frame in self._guest.receive()))

    def _hears(self, word: bytes) -> bool:
        try:
            data, self._peer = self._server.recvfrom(65536)
        except BlockingIOError:
            return False
        return word in data

    def _word(self) -> bytes:
        self._count += 1
        return b"udp %d %d" % (self._port, self._count)


class TcpFlow:
    """As above. After the first word that was not heard, the flow is good for no other in that direction."""

    def __init__(self, stage: Stage, stack: ExitStack, server: str, port: int) -> None:
        self._stage, self._guest, self._address, self._port = stage, stage.guest, server, port
        self._sent, self._seen, self._count = _TCP_FIRST_NUMBER, 0, 0
        with stage.lab.inside("internet"):
            listening = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((server, port))
        listening.listen()
        listening.setblocking(False)
        self._send(frames.SYN)
        self._sent += 1
        assert _wait(_ARRIVES_SECONDS, self._finds_greeting), f"no TCP connection to {server}"
        self._send(frames.ACK)
        listening.settimeout(_ARRIVES_SECONDS)
        self._server = stack.enter_context(listening.accept()[0])
        self._server.setblocking(False)

    def say(self, within: float = _ARRIVES_SECONDS) -> bool:
        word = self._word()
        self._send(frames.PUSH | frames.ACK, word)
        heard = _wait(within, lambda: self._hears(word))
        self._sent += len(word) if heard else 0
        return heard

    def push(self, within: float = _ARRIVES_SECONDS) -> bool:
        word = self._word()
        self._server.send(word)
        heard = _wait(within, lambda: any(word in frame for frame in self._guest.receive()))
        if heard:
            self._seen += len(word)
            self._send(frames.ACK)
        return heard

    def _send(self, flags: int, data: bytes = b"") -> None:
        source, ports = self._guest.address, (self._port, self._port)
        segment = tcp(source, self._address, *ports, flags, self._sent, self._seen, data)
        packet = ipv4(source, self._address, frames.TCP, segment)
        self._guest.send(ethernet(self._stage.gateway_mac, self._guest.mac, frames.IPV4, packet))

    def _finds_greeting(self) -> bool:
        for frame in self._guest.receive():
            if frames.destination_port(frame) == self._port and frame[47] == frames.SYN | frames.ACK:
                self._seen = struct.unpack_from("!I", frame, 38)[0] + 1
                return True
        return False

    def _hears(self, word: bytes) -> bool:
        try:
            return word in self._server.recv(65536)
        except BlockingIOError:
            return False

    def _word(self) -> bytes:
        self._count += 1
        return b"tcp %d %d" % (self._port, self._count)


Flow = UdpFlow | TcpFlow


def is_open(flow: Flow) -> bool:
    """In both directions; the server speaks first, which a guest that only listens has to hear."""
    pushed = flow.push()
    return flow.say() and pushed


def is_dead(flow: Flow) -> bool:
    """In both directions."""
    pushed = flow.push(_SETTLE_SECONDS)
    return not flow.say(_SETTLE_SECONDS) and not pushed


def _wait(seconds: float, heard: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not heard():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
