"""The 100 MB that ``upload`` and ``download`` carry, and what both sides do with them between the measured moments."""

from __future__ import annotations

import hashlib
import random
from functools import cache

from benchmarks.stage import Stage

PAYLOAD_BYTES = 100_000_000
GUEST_PATH = "/home/user/payload.bin"
ROUNDS = 5


@cache
def payload() -> bytes:
    """Pseudo-random, so nothing on the way can shorten it."""
    return random.Random(20240601).randbytes(PAYLOAD_BYTES)


@cache
def payload_digest() -> str:
    return hashlib.sha256(payload()).hexdigest()


def check_arrived(stage: Stage) -> None:
    """Both guests hold the payload, to the byte."""
    told = stage.client.run(stage.sandbox, "sha256sum", GUEST_PATH).split()[0]
    raw = stage.raw_port.ask(f"hash {GUEST_PATH}")
    if told != payload_digest() or raw != payload_digest():
        raise RuntimeError(f"the payload changed on its way: {told}, {raw}")


def remove_both(stage: Stage) -> None:
    """The next round starts with nothing to write back."""
    stage.client.run(stage.sandbox, "sh", "-c", f"rm {GUEST_PATH}; sync")
    stage.raw_port.ask(f"remove {GUEST_PATH}")


def megabytes_per_second(seconds: float) -> float:
    return PAYLOAD_BYTES / 1e6 / seconds
