"""``ssh_key_echo``: one byte to a guest and back through the gateway's SSH, against the same without. Reported."""

from __future__ import annotations

from benchmarks.figure import Figure, median
from benchmarks.ssh_ways import SshWays, echo_ms
from benchmarks.stage import Stage

_KEYS = 200
_WARM_UP = 20


def measure(stage: Stage) -> list[Figure]:
    ways = SshWays(stage)
    ours, bare = echo_ms((ways.relayed, ways.direct), _KEYS)
    return [Figure("ssh_key_echo", median(ours[_WARM_UP:]), "ms", median(bare[_WARM_UP:]))]
