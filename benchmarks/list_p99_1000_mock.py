"""``list_p99_1000_mock``: a page of 100 of 1,000 fake sandboxes, wherever the page lies; 99th percentile."""

from __future__ import annotations

import time

from benchmarks.figure import Figure, at_most, percentile
from benchmarks.many_mock_sandboxes import fill
from benchmarks.stage import Stage

PASSES = 50


def measure(stage: Stage) -> list[Figure]:
    samples: list[float] = []
    with stage.mock_manager("l") as manager, manager.client() as client:
        fill(manager, 1000)
        for _ in range(PASSES):
            cursor, seen = "", 0
            while True:
                began = time.perf_counter()
                page = client.json("GET", f"/sandboxes?limit=100{cursor and f'&cursor={cursor}'}")
                samples.append((time.perf_counter() - began) * 1000)
                seen += len(page["items"])
                if not page.get("next_cursor"):
                    break
                cursor = page["next_cursor"]
            if seen != 1000:
                raise RuntimeError(f"the pages hold {seen} sandboxes instead of 1000")
    return [Figure("list_p99_1000_mock", percentile(samples, 99), "ms", target=at_most(50, on="value"))]
