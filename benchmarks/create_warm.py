"""``create_warm``: from asking for a sandbox to the first ``true`` answered in it, taken out of a warm pool, against twice a
``true`` in a sandbox that runs and 15 ms."""

from __future__ import annotations

import time

from benchmarks.figure import Figure, at_most, median
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 6
_READY_SECONDS = 300.0
_SETTLE_SECONDS = 3.0
_ALLOWED_SECONDS = 0.015


def measure(stage: Stage) -> list[Figure]:
    client, running = stage.client, stage.sandbox
    ours: list[float] = []
    roundtrips: list[float] = []
    for number in range(ROUNDS + 1):
        client.json("PUT", "/warm-pools/base", {"size": 1})
        _await_ready(stage)
        # The guest that has just come up makes its last preparations.
        time.sleep(_SETTLE_SECONDS)
        for _ in range(10):
            began = time.perf_counter()
            client.run(running, "/bin/true")
            roundtrips.append(time.perf_counter() - began)
        seconds = client.time_first_answer(f"warm-{number}")
        say(f"create_warm: {seconds * 1000:.0f} ms")
        if number > 0:
            ours.append(seconds)
    client.request("DELETE", "/warm-pools/base")
    allowed = 2 * median(roundtrips) + _ALLOWED_SECONDS
    return [Figure("create_warm", median(ours), "s", allowed, at_most(1))]


def _await_ready(stage: Stage) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        (pool,) = stage.client.json("GET", "/warm-pools")["items"]
        if pool["ready"] >= 1:
            return
        time.sleep(0.2)
    raise TimeoutError("the warm pool was not filled")
