"""The ring of the newest output."""

from __future__ import annotations

import random

from atelier.guest_agent.output_ring import OutputRing


def replay(ring: OutputRing, stream: str) -> bytes:
    return b"".join(data for name, data in ring if name == stream)


def test_it_keeps_all_until_it_is_full_and_then_the_newest() -> None:
    ring = OutputRing(100)
    ring.append("stdout", b"a" * 60)
    assert (replay(ring, "stdout"), ring.lost_bytes) == (b"a" * 60, 0)
    ring.append("stdout", b"b" * 60)
    assert (replay(ring, "stdout"), ring.lost_bytes) == (b"a" * 40 + b"b" * 60, 20)
    ring.append("stderr", b"c" * 500)
    assert (replay(ring, "stdout"), replay(ring, "stderr"), ring.lost_bytes) == (b"", b"c" * 100, 520)


def test_the_order_of_the_streams_is_kept() -> None:
    ring = OutputRing(1000)
    for number in range(10):
        ring.append("stdout" if number % 2 else "stderr", str(number).encode())
    assert b"".join(data for _, data in ring) == b"0123456789"


def test_single_bytes_cost_no_object_each() -> None:
    ring = OutputRing(1024 * 1024)
    for _ in range(50_000):
        ring.append("pty", b"x")
    assert len(list(ring)) < 10
    assert replay(ring, "pty") == b"x" * 50_000


def test_alternating_single_bytes_are_bounded_too() -> None:
    ring = OutputRing(1024 * 1024)
    for _ in range(20_000):
        ring.append("stdout", b"o")
        ring.append("stderr", b"e")
    assert len(list(ring)) <= 4096
    assert len(ring) + ring.lost_bytes == 40_000


def test_it_is_a_suffix_of_what_was_written() -> None:
    chance = random.Random(7)
    for _ in range(50):
        limit = chance.randrange(1, 5000)
        ring = OutputRing(limit)
        written = b""
        for _ in range(100):
            piece = chance.randbytes(chance.choice((1, 3, 100, 9000)))
            ring.append("stdout", piece)
            written += piece
        kept = replay(ring, "stdout")
        assert written.endswith(kept)
        assert len(kept) == min(limit, len(written)) == len(ring)
        assert ring.lost_bytes == len(written) - len(kept)
