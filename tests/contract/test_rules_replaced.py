"""Rules that are replaced while guests send: nothing passes that neither the old ones nor the new ones let pass.

The kernel gives a new chain its policy, and a new set of intervals its content, a moment after it has begun to use them; one
forbidden packet in that moment would open its flow for good. Rules are replaced whenever the host's addresses change.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tests import network_frames as frames
from tests.contract.packet_stage import LISTENING_PORT, Stage
from tests.contract.test_network_packets import NO_LAB, open_stage
from tests.network_frames import BROADCAST, arp, ethernet, ipv4, udp
from tests.network_lab import FRESH_HOST_ADDRESS, INSTALLATION, INTERNET, METADATA, PRIVATE, Home, network_lab

pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

_CHANGES = 80
_PAUSE_SECONDS = 0.05
_ANYWHERE = frozenset({"bridge", "home", "host", "internet", "neighbour"})
_BEHIND_THE_BRIDGE = _ANYWHERE - {"bridge"}


# An ordinary user's home has the rules of root's.
@pytest.fixture(params=[Home.ROOT, Home.HOST])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    with network_lab(tmp_path, request.param) as lab:
        lab.start_holder()
        async with AsyncExitStack() as stack:
            yield await open_stage(lab, stack)


def _to(destination: str, *, port: int = 9, source: str = "") -> Callable[[Stage, bytes], bytes]:
    def make(stage: Stage, mark: bytes) -> bytes:
        content = udp(5000, port, mark)
        return stage.to_gateway(ipv4(source or stage.guest.address, destination, frames.UDP, content))

    return make


def _arp_of_another(stage: Stage, mark: bytes) -> bytes:
    guest, neighbour = stage.guest, stage.neighbour
    packet = arp(2, guest.mac, guest.gateway, neighbour.mac, neighbour.address, mark)
    return ethernet(BROADCAST, guest.mac, frames.ARP, packet)


def _of_another_kind(stage: Stage, mark: bytes) -> bytes:
    return ethernet(stage.gateway_mac, stage.guest.mac, 0x88B5, mark)


def test_nothing_forbidden_passes_meanwhile(stage: Stage) -> None:
    guest, neighbour = stage.guest, stage.neighbour
    forbidden = {
        "a private network": (_to(PRIVATE[1]), _BEHIND_THE_BRIDGE),
        "the metadata service": (_to(METADATA), _BEHIND_THE_BRIDGE),
        "the neighbour by the gateway": (_to(neighbour.address), _BEHIND_THE_BRIDGE),
        "the gateway": (_to(guest.gateway, port=LISTENING_PORT), _BEHIND_THE_BRIDGE),
        "a stolen address": (_to(INTERNET, source=neighbour.address), _ANYWHERE),
        "ARP: the gateway's address is mine": (_arp_of_another, _ANYWHERE),
        "a frame of an unknown kind": (_of_another_kind, _ANYWHERE),
    }
    marks = {b"forbidden-%02d" % number: name for number, name in enumerate(forbidden)}
    frames_sent = [forbidden[name][0](stage, mark) for mark, name in marks.items()]
    open_mark = b"allowed-00"
    frames_sent.append(_to(INTERNET)(stage, open_mark))
    heard: Counter[tuple[str, str]] = Counter()

    def listen() -> None:
        for ear in _ANYWHERE & stage.ears.keys():
            for frame in stage.ears[ear].receive():
                for mark, name in marks.items():
                    heard[name, ear] += mark in frame and ear in forbidden[name][1]
                heard["allowed", ear] += open_mark in frame
        stage.guest.receive()

    before, sent = _table_handle(stage), 0
    changing = threading.Thread(target=_change_addresses, args=(stage,))
    changing.start()
    while changing.is_alive():
        sent += 1
        for frame in frames_sent:
            stage.guest.send(frame)
        listen()
    stage.wait_through()
    listen()
    changing.join()
    assert _table_handle(stage) != before, "they were replaced"
    assert heard["allowed", "internet"] > sent / 2, "positive control"
    assert [(name, ear, count) for (name, ear), count in heard.items() if count and name != "allowed"] == []


def _change_addresses(stage: Stage) -> None:
    pause = threading.Event()
    for number in range(_CHANGES):
        verb = "del" if number % 2 else "add"
        stage.lab.in_host("ip", "address", verb, f"{FRESH_HOST_ADDRESS}/32", "dev", "lo")
        pause.wait(_PAUSE_SECONDS)


def _table_handle(stage: Stage) -> int:
    """Each table that is made anew has another."""
    listing = stage.lab.in_home("nft", "-a", "list", "table", "inet", f"atelier_{INSTALLATION}")
    found = re.search(r"^table inet \S+ \{ # handle (\d+)", listing)
    assert found is not None, listing[:200]
    return int(found[1])
