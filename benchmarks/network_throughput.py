"""``network_upload``, ``network_download``: one TCP connection of a sandbox's guest with the internet, a namespace, over its
slot (bridge, all rules, two translations), against the same guest on a bare TAP that is routed there and nothing else. What
is told is the round whose ratio is the median one.

``..._plain``: the same with a guest without an emulator. Its speed is the kernel's own, many times that of an emulated
guest, so what bridge and rules cost is seen undiluted; reported, not judged.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time

from tests.network_lab import why_no_lab

from benchmarks.figure import Figure, Target, at_least
from benchmarks.network_paths import NetworkPath, emulated_guest, network_paths, plain_guest
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 17
SECONDS = 0.3
TARGET = at_least(0.9)
_WARM_UP_SECONDS = 0.15
_PIECE_BYTES = 256 * 1024


def measure(stage: Stage) -> list[Figure]:
    if missing := why_no_lab():
        say(f"network_throughput cannot be measured here: {missing}")
        return []
    figures: list[Figure] = []
    with network_paths(stage.folder / "t1") as paths, contextlib.ExitStack() as guests:
        for path in paths:
            guests.enter_context(emulated_guest(path, stage.folder / f"g-{path.name}", stage.ingredients))
        figures += _figures(paths, "", TARGET)
    with network_paths(stage.folder / "t2") as paths, contextlib.ExitStack() as guests:
        for path in paths:
            guests.enter_context(plain_guest(path))
        figures += _figures(paths, "_plain", None)
    return figures


def _figures(paths: tuple[NetworkPath, NetworkPath], suffix: str, target: Target | None) -> list[Figure]:
    figures: list[Figure] = []
    for name, transfer in (("network_upload", _upload), ("network_download", _download)):
        rounds: list[tuple[float, float]] = []
        for number in range(ROUNDS + 1):
            # Turn about, so that neither is always the one after the other.
            order = paths if number % 2 else paths[::-1]
            rates = {path.name: transfer(path) for path in order}
            rounds.append((rates["slot"], rates["bare"]))
            say(f"{name}{suffix}: {rates['slot']:.1f} MB/s, bare {rates['bare']:.1f} MB/s")
        # The first round warms up.
        ours, bare = _median_round(rounds[1:])
        figures.append(Figure(f"{name}{suffix}", ours, "MB/s", bare, target))
    return figures


def _median_round(rounds: list[tuple[float, float]]) -> tuple[float, float]:
    """Both sides of a round meet the same moment's load, so rounds are compared, not sides."""
    return sorted(rounds, key=lambda each: each[0] / each[1])[len(rounds) // 2]


def _order(path: NetworkPath, order: bytes) -> socket.socket:
    path.listening.settimeout(60)
    connection, _ = path.listening.accept()
    connection.settimeout(60)
    connection.sendall(order)
    return connection


def _upload(path: NetworkPath) -> float:
    """MB/s that arrive here."""
    buffer = bytearray(_PIECE_BYTES)
    with _order(path, b"s") as connection:
        # Its end is a reset: what is under way still is nobody's concern.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        warm = time.perf_counter() + _WARM_UP_SECONDS
        while time.perf_counter() < warm:
            _received(connection, buffer)
        began, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < SECONDS:
            count += _received(connection, buffer)
    return count / 1e6 / seconds


def _received(connection: socket.socket, buffer: bytearray) -> int:
    count = connection.recv_into(buffer)
    if count == 0:
        raise RuntimeError("the guest stopped sending")
    return count


def _download(path: NetworkPath) -> float:
    """MB/s that arrive there, until the guest has said how many bytes it were."""
    piece = bytes(_PIECE_BYTES)
    with _order(path, b"r") as connection:
        began, sent = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            connection.sendall(piece)
            sent += len(piece)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(8, socket.MSG_WAITALL)
        seconds = time.perf_counter() - began
    if int.from_bytes(answer, "big") != sent:
        raise RuntimeError(f"{sent} bytes were sent, the guest says {answer.hex()}")
    return sent / 1e6 / seconds
