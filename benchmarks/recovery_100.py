"""``recovery_100``: after ``kill -9`` of a manager with 100 fake sandboxes, from the start of the next one until it answers
and all of them run again. Reported.

Fake machines end with their manager, which counts as a reboot of the host: each is booted again from its disk.
"""

from __future__ import annotations

import os
import signal
import time

from benchmarks.figure import Figure, median
from benchmarks.many_mock_sandboxes import fill
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 5
COUNT = 100


def measure(stage: Stage) -> list[Figure]:
    with stage.mock_manager("k") as manager:
        fill(manager, COUNT)
        os.kill(manager.pid, signal.SIGKILL)
    samples: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        with stage.mock_manager("k") as manager, manager.client() as client:
            while (states := _states(client.json("GET", "/sandboxes?limit=500"))) != ["running"] * COUNT:
                if "failed" in states or time.perf_counter() - began > 300:
                    raise RuntimeError(f"not all sandboxes run again: {states}")
                time.sleep(0.02)
            samples.append(time.perf_counter() - began)
            say(f"recovery_100: {samples[-1]:.2f} s")
            os.kill(manager.pid, signal.SIGKILL)
    return [Figure("recovery_100", median(samples), "s")]


def _states(page: dict[str, list[dict[str, str]]]) -> list[str]:
    return [row["state"] for row in page["items"]]
