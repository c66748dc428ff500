"""``ssh_splice``: bytes from a guest by a jump through the gateway, which only carries them, against the same sshd without."""

from __future__ import annotations

from benchmarks.figure import Figure
from benchmarks.ssh_ways import SshWays, compare
from benchmarks.stage import Stage


def measure(stage: Stage) -> list[Figure]:
    ways = SshWays(stage)
    return compare("ssh_splice", ways.spliced, ways.direct, 0.9)
