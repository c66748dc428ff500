"""``manager_rss_1``: resident memory of a manager with one real sandbox that has just run a program. Reported only."""

from __future__ import annotations

from benchmarks.figure import Figure
from benchmarks.manager_process import resident_mib
from benchmarks.stage import Stage


def measure(stage: Stage) -> list[Figure]:
    stage.client.run(stage.sandbox, "/bin/true")
    return [Figure("manager_rss_1", resident_mib(stage.manager.pid), "MiB")]
