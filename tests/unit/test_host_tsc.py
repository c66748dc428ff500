"""The rate of the time-stamp counter."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest

from atelier.host import tsc
from atelier.host.processes import boot_id

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86-64 machine")


def test_two_measurements_agree() -> None:
    first, second = tsc.measure_tsc_khz(), tsc.measure_tsc_khz()
    assert 500_000 < first < 10_000_000
    assert abs(first - second) < first / 1000


def test_the_rate_is_near_what_the_kernel_says() -> None:
    said = re.search(r"cpu MHz\s*: ([0-9.]+)", Path("/proc/cpuinfo").read_text())
    if said is None or "constant_tsc" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the kernel does not say")
    # The processor's clock moves around the counter's rate, by no more than this.
    assert tsc.measure_tsc_khz() / 1000 == pytest.approx(float(said[1]), rel=0.9)


def test_the_answer_is_kept_for_this_boot_only(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "tsc.json"
    measured = tsc.cached_tsc_khz(cache)
    assert json.loads(cache.read_bytes()) == {"boot_id": boot_id(), "tsc_khz": measured}
    cache.write_text(json.dumps({"boot_id": boot_id(), "tsc_khz": 1234}))
    assert tsc.cached_tsc_khz(cache) == 1234
    for spoilt in (json.dumps({"boot_id": "another", "tsc_khz": 1234}), "{", "[]", "{}"):
        cache.write_text(spoilt)
        assert tsc.cached_tsc_khz(cache) > 500_000
