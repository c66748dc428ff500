"""The LVM driver in a host that has a volume group: suites of ``tests/contract``, and a pool that grows by itself."""

from __future__ import annotations

import pytest
from tests.host.emulated_host import CHECKOUT, LVM_DISK, PYTHON, EmulatedHost

GROUP = "vg-test"
_SUITES = " ".join(f"tests/contract/test_storage_{name}.py" for name in ("contract", "snapshots", "lvm"))
_OF_CONTRACT = (
    "test_volumes_outlive_the_driver",
    "test_what_is_no_id_is_refused",
    "test_a_snapshot_becomes_a_disk_of_its_own",
    "test_freezing_that_is_given_up_leaves_all_as_it_was",
    "test_an_exported_disk_serves_another_installation",
)
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


def test_what_only_lvm_can_prove(host: EmulatedHost) -> None:
    """All of ``test_storage_lvm.py``, and of the contract that other drivers keep to in seconds what LVM's own state decides:
    a command of LVM's takes a second and more here."""
    of_contract = " or ".join(_OF_CONTRACT)
    done = host.run(
        f"cd {CHECKOUT} && ATELIER_TEST_THIN_POOL={GROUP}/pool {PYTHON} -m pytest -q -p no:cacheprovider --durations=0 "
        f"{_SUITES} -k 'test_storage_lvm or (lvm and ({of_contract}))'",
        seconds=3600,
        check=False,
    )
    print(done.out)
    assert done.status == 0, done.out[-8000:]
    assert "skipped" not in done.out
