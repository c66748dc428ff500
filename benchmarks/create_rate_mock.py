"""``create_rate_mock``: sandboxes per second that become ``running`` on fakes: the control plane's own pace."""

from __future__ import annotations

from benchmarks.figure import Figure, median
from benchmarks.many_mock_sandboxes import fill
from benchmarks.stage import Stage

ROUNDS = 5
COUNT = 100


def measure(stage: Stage) -> list[Figure]:
    rates: list[float] = []
    for number in range(ROUNDS):
        with stage.mock_manager(f"f{number}") as manager:
            rates.append(fill(manager, COUNT))
    return [Figure("create_rate_mock", median(rates), "1/s")]
