"""The LVM driver in a host that has a volume group: the suites of ``tests/contract``, and a pool that grows by itself."""

from __future__ import annotations

import pytest
from tests.host.emulated_host import CHECKOUT, LVM_DISK, PYTHON, EmulatedHost

GROUP = "vg-test"
_ENSURE_POOL = """
import asyncio
from atelier.host_setup.thin_pool import ensure_thin_pool
asyncio.run(ensure_thin_pool("{group}", "pool", size_percent=50))
"""


@pytest.fixture(scope="module")
def host(shared_host: EmulatedHost) -> EmulatedHost:
    shared_host.run(f"pvcreate -q {LVM_DISK} && vgcreate -q {GROUP} {LVM_DISK}")
    for _ in range(2):  # twice is once
        shared_host.run(f"{PYTHON} -", given=_ENSURE_POOL.format(group=GROUP).encode())
    return shared_host


def test_the_pool_zeroes_its_blocks_and_grows_by_itself(host: EmulatedHost) -> None:
    told = host.run(f"lvs --noheadings -o lv_attr,lv_profile,seg_monitor,lv_when_full {GROUP}/pool").out.split()
    assert told[0][7] == "z"
    assert told[1:] == ["atelier", "monitored", "error"]


def test_the_contract_of_every_storage_driver_and_what_is_lvms_own(host: EmulatedHost) -> None:
    suites = " ".join(f"tests/contract/test_storage_{name}.py" for name in ("contract", "snapshots", "lvm"))
    done = host.run(
        f"cd {CHECKOUT} && ATELIER_TEST_THIN_POOL={GROUP}/pool {PYTHON} -m pytest -q -p no:cacheprovider {suites} -k lvm",
        seconds=1800,
        check=False,
    )
    assert done.status == 0, done.out[-8000:]
    assert "skipped" not in done.out
