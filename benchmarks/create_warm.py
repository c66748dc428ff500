"""``create_warm``: from asking for a sandbox to the first ``true`` answered in it, taken out of a warm pool, against twice a
``true`` in a sandbox that runs and 15 ms.

With templates, as by default: the sandbox that runs and those in the pool are restored from the same one. Both have been
idle equally long when they are asked, and take turns in being the first: under emulation the first ``true`` after some
seconds of rest takes up to three times as long as one right after another, in whatever guest.
"""

from __future__ import annotations

import time

from benchmarks.api_client import ApiClient
from benchmarks.figure import Figure, at_most, median
from benchmarks.progress import say
from benchmarks.stage import Stage
from benchmarks.templated_manager import templated_manager

ROUNDS = 12
_READY_SECONDS = 300.0
_SETTLE_SECONDS = 3.0
_ALLOWED_SECONDS = 0.015


def measure(stage: Stage) -> list[Figure]:
    ours: list[float] = []
    roundtrips: list[float] = []
    with templated_manager(stage.folder / "w", stage.ingredients) as (client, _):
        running = client.create("running")
        client.json("PUT", "/warm-pools/base", {"size": 1})
        for number in range(ROUNDS + 1):
            _await_ready(client)
            # The guest that has just come up makes its last preparations.
            time.sleep(_SETTLE_SECONDS)
            roundtrip = _time_true(client, running) if number % 2 else None
            seconds = client.time_first_answer(f"warm-{number}")
            if roundtrip is None:
                roundtrip = _time_true(client, running)
            say(f"create_warm: {seconds * 1000:.0f} ms, a true {roundtrip * 1000:.0f} ms")
            if number > 0:
                ours.append(seconds)
                roundtrips.append(roundtrip)
    allowed = 2 * median(roundtrips) + _ALLOWED_SECONDS
    return [Figure("create_warm", median(ours), "s", allowed, at_most(1))]


def _time_true(client: ApiClient, sandbox: str) -> float:
    began = time.perf_counter()
    client.run(sandbox, "/bin/true")
    return time.perf_counter() - began


def _await_ready(client: ApiClient) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        (pool,) = client.json("GET", "/warm-pools")["items"]
        if pool["ready"] >= 1:
            return
        time.sleep(0.2)
    raise TimeoutError("the warm pool was not filled")
