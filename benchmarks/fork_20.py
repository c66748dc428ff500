"""``fork_20``: from asking for 20 forks of a sandbox that runs until each has answered its first ``true``, against 20
clones of a bare machine, saved, baked and restored in the same way (``forks``)."""

from __future__ import annotations

from benchmarks.figure import Figure, at_most, median
from benchmarks.stage import Stage


def measure(stage: Stage) -> list[Figure]:
    ours, bare = stage.forks.ours, stage.forks.bare
    seconds = [median([each.seconds for each in side]) for side in (ours, bare)]
    return [Figure("fork_20", seconds[0], "s", seconds[1], at_most(1.25))]
