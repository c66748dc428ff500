"""``manager_rss_500_mock``: resident memory of a manager that holds 500 fake sandboxes."""

from __future__ import annotations

from benchmarks.figure import Figure, at_most
from benchmarks.manager_process import resident_mib
from benchmarks.many_mock_sandboxes import fill
from benchmarks.stage import Stage


def measure(stage: Stage) -> list[Figure]:
    with stage.mock_manager("r") as manager:
        fill(manager, 500)
        return [Figure("manager_rss_500_mock", resident_mib(manager.pid), "MiB", target=at_most(150, on="value"))]
