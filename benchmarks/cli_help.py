"""``cli_help``: ``atelier --help`` from start to end, beside a Python that does nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.figure import Figure, at_most, median
from benchmarks.stage import Stage

ROUNDS = 20


def measure(stage: Stage) -> list[Figure]:
    atelier = str(Path(sys.prefix) / "bin" / "atelier")
    ours: list[float] = []
    bare: list[float] = []
    for number in range(ROUNDS + 1):
        our_ms = _time([atelier, "--help"])
        bare_ms = _time([sys.executable, "-c", "pass"])
        if number > 0:
            ours.append(our_ms)
            bare.append(bare_ms)
    return [Figure("cli_help", median(ours), "ms", median(bare), at_most(150, on="value"))]


def _time(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1000
