"""``create_template``: from asking for a sandbox to the first ``true`` answered in it, restored from a template, against a
bare restore of the same template, identity included, to the same point."""

from __future__ import annotations

import contextlib
import os
import time

from atelier.drivers.vmm.qemu_arguments import OpenMemory
from atelier.host.sealed_memory import sealed_copy
from atelier.model.machine import DiskFile
from benchmarks.bare_machine import SavedSide
from benchmarks.bare_restore import chain_of, restored_machine
from benchmarks.figure import Figure, at_most, median
from benchmarks.progress import say
from benchmarks.stage import Stage
from benchmarks.templated_manager import templated_manager

ROUNDS = 9


def measure(stage: Stage) -> list[Figure]:
    ingredients = stage.ingredients
    ours: list[float] = []
    bare: list[float] = []
    folder = stage.folder / "t"
    with contextlib.ExitStack() as stack:
        client, template = stack.enter_context(templated_manager(folder, ingredients))
        files = folder / "data" / "snapshots" / template
        descriptor = sealed_copy(files / "memory")
        stack.callback(os.close, descriptor)
        disk = DiskFile(folder / "data" / "volumes" / "snapshots" / f"{template}.qcow2", "qcow2")
        saved = SavedSide(chain_of(disk), files / "tools", OpenMemory(descriptor, shared=False))
        for number in range(ROUNDS + 1):
            began = time.perf_counter()
            with restored_machine(stage.folder / f"t{number}", ingredients, saved, files / "state") as restored:
                restored.channel.run("/bin/true")
                bare_seconds = time.perf_counter() - began
            our_seconds = client.time_first_answer(f"restored-{number}")
            say(f"create_template: {our_seconds:.3f} s, bare {bare_seconds:.3f} s")
            if number > 0:
                ours.append(our_seconds)
                bare.append(bare_seconds)
    return [Figure("create_template", median(ours), "s", median(bare), at_most(1.25))]
