"""A sandbox's own network card, sent from and listened on by a program in its guest: a guest of the packet table."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.contract.packet_stage import Guest

_RELAY = """
import os, select, socket
card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
card.bind(("eth0", 0))
print("ready", flush=True)
pending = b""
while True:
    for ready in select.select([0, card], [], [])[0]:
        if ready == 0:
            data = os.read(0, 65536)
            if not data:
                raise SystemExit
            *lines, pending = (pending + data).split(b"\\n")
            for line in lines:
                card.send(bytes.fromhex(line.decode()))
        else:
            frame, origin = card.recvfrom(65536)
            if origin[2] != socket.PACKET_OUTGOING:
                print(frame.hex(), flush=True)
"""
_READY_SECONDS = 60.0


class GuestCard(Guest):
    """Frames go over the streams of a program that runs in the guest. Its kernel answers what asks for it, as ever."""

    def __init__(self, relay: subprocess.Popen[bytes], mac: str, address: str, gateway: str) -> None:
        assert relay.stdin is not None and relay.stdout is not None
        self.descriptor = relay.stdout.fileno()
        self.mac, self.address, self.gateway = mac, address, gateway
        self._relay, self._words, self._pending = relay, relay.stdin, b""
        os.set_blocking(self.descriptor, False)
        self._wait_ready()

    def send(self, frame: bytes) -> None:
        self._words.write(frame.hex().encode() + b"\n")
        self._words.flush()

    def receive(self) -> list[bytes]:
        return [bytes.fromhex(line.decode()) for line in self._read_lines()]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while self._read_lines()[:1] != [b"ready"]:
            assert self._relay.poll() is None and time.monotonic() < deadline, "the guest's program does not run"
            select.select([self.descriptor], [], [], 0.5)

    def _read_lines(self) -> list[bytes]:
        while True:
            try:
                data = os.read(self.descriptor, 65536)
            except BlockingIOError:
                break
            if not data:
                break
            self._pending += data
        *lines, self._pending = self._pending.split(b"\n")
        return lines


@contextmanager
def guest_card(in_guest: Sequence[str], mac: str, address: str, gateway: str) -> Iterator[GuestCard]:
    """``in_guest``: the words before a command by which it runs in the guest as root, its streams passed on."""
    with subprocess.Popen([*in_guest, "python3", "-c", _RELAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as relay:
        try:
            yield GuestCard(relay, mac, address, gateway)
        finally:
            # Its input ends, and so does the program.
            relay.terminate()
