"""``fork_pss``: memory of a fork's VMM when all 20 have answered their first ``true``, the shared pages divided among those
that share them, against a bare clone's (``forks``)."""

from __future__ import annotations

from benchmarks.figure import Figure, at_most, median
from benchmarks.stage import Stage


def measure(stage: Stage) -> list[Figure]:
    ours, bare = stage.forks.ours, stage.forks.bare
    memory = [median([each.pss_mib for each in side]) for side in (ours, bare)]
    return [Figure("fork_pss", memory[0], "MiB", memory[1], at_most(1.2))]
