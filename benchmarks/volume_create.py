"""``volume_create_lvm``, ``volume_create_qcow2``: a sandbox's disk over a base that is there, by the storage drivers, against
bare ``lvcreate`` and bare ``qemu-img create``; in an emulated host, where all is slow and Python some 16 times slower.
Reported, not judged.
"""

from __future__ import annotations

import json

from tests.host.emulated_host import LVM_DISK, PYTHON, save_host, started_from
from tests.host.host_image import ensure_image, why_not

from atelier.config.settings import load_settings
from benchmarks.figure import Figure, median
from benchmarks.progress import say
from benchmarks.stage import Stage

GROUP = "vg-bench"
_SECONDS = 1200.0


def measure(stage: Stage) -> list[Figure]:
    if missing := why_not():
        say(f"volume_create cannot be measured here: {missing}")
        return []
    saved_folder, folder = stage.folder / "saved-host", stage.folder / "host"
    for each in (saved_folder, folder):
        each.mkdir()
    saved = save_host(ensure_image(load_settings().cache_dir), saved_folder)
    with started_from(saved, folder) as host:
        host.run(f"vgcreate -q {GROUP} {LVM_DISK} && lvcreate -q --type thin-pool -Zy -l 90%FREE -n pool {GROUP}")
        told = host.run(
            f"cd /opt/atelier/checkout && ATELIER_TEST_THIN_POOL={GROUP}/pool {PYTHON} -m benchmarks.volumes_in_host",
            seconds=_SECONDS,
        )
    samples = json.loads(told.out.splitlines()[-1])
    return [
        Figure(f"volume_create_{kind}", median(samples[kind]["ours"]), "ms", median(samples[kind]["bare"]))
        for kind in ("lvm", "qcow2")
    ]
