"""``request_roundtrip``: one Stat through the API against one ping over a raw virtio-serial port. Reported, not judged."""

from __future__ import annotations

import time

from benchmarks.figure import Figure, median
from benchmarks.stage import Stage

ROUNDS = 200
_WARM_UP = 20


def measure(stage: Stage) -> list[Figure]:
    client, sandbox, port = stage.client, stage.sandbox, stage.raw_port
    path = f"/sandboxes/{sandbox}/files/stat?path=%2Fetc%2Fpasswd"
    ours: list[float] = []
    bare: list[float] = []
    for number in range(ROUNDS + _WARM_UP):
        began = time.perf_counter()
        client.request("GET", path)
        between = time.perf_counter()
        if port.ask("ping") != "pong":
            raise RuntimeError("the raw guest does not answer")
        ended = time.perf_counter()
        if number >= _WARM_UP:
            ours.append((between - began) * 1000)
            bare.append((ended - between) * 1000)
    return [Figure("request_roundtrip", median(ours), "ms", median(bare))]
