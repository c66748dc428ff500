"""``ssh_relay``: bytes from a guest through the gateway's SSH, against the same sshd without the gateway's SSH between."""

from __future__ import annotations

from benchmarks.figure import Figure
from benchmarks.ssh_ways import SshWays, compare
from benchmarks.stage import Stage


def measure(stage: Stage) -> list[Figure]:
    ways = SshWays(stage)
    return compare("ssh_relay", ways.relayed, ways.direct, 0.3)
