"""Fills a mock manager with sandboxes over several connections at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.manager_process import RunningManager

_CLIENTS = 4
_SMALL = {"memory_mib": 128, "disk_mib": 512}


def fill(manager: RunningManager, count: int) -> float:
    """Create ``count`` sandboxes and return how many became ``running`` per second."""

    def create_share(share: int) -> None:
        with manager.client() as client:
            for number in range(share, count, _CLIENTS):
                client.create(f"mock-{number}", **_SMALL)

    began = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        for done in [pool.submit(create_share, share) for share in range(_CLIENTS)]:
            done.result()
    return count / (time.perf_counter() - began)
