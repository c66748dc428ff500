"""``resume``: from asking for a paused sandbox to the first ``true`` answered in it, against bare QEMU that loads the same
memory over the same disk, identity included, to the same point."""

from __future__ import annotations

import os
import time

from atelier.model.machine import DiskFile
from benchmarks.bare_machine import SavedSide
from benchmarks.bare_restore import chain_of, restored_machine
from benchmarks.figure import Figure, at_most, median
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 7


def measure(stage: Stage) -> list[Figure]:
    client, sandbox = stage.client, stage.client.create("resumed")
    data_dir = stage.folder / "m" / "data"
    kept = stage.folder / "stream"
    ours: list[float] = []
    bare: list[float] = []
    for number in range(ROUNDS + 1):
        client.run(sandbox, "/bin/true")
        client.json("POST", f"/sandboxes/{sandbox}/pause?wait=true")
        os.link(data_dir / "paused" / f"{sandbox}.memory", kept)
        disk = DiskFile(data_dir / "volumes" / f"{sandbox}.qcow2", "qcow2")
        saved = SavedSide(chain_of(disk), data_dir / "paused" / f"{sandbox}.tools", None)
        began = time.perf_counter()
        with restored_machine(stage.folder / f"r{number}", stage.ingredients, saved, kept) as restored:
            restored.channel.run("/bin/true")
            bare_seconds = time.perf_counter() - began
        began = time.perf_counter()
        client.json("POST", f"/sandboxes/{sandbox}/resume?wait=true")
        client.run(sandbox, "/bin/true")
        our_seconds = time.perf_counter() - began
        kept.unlink()
        say(f"resume: {our_seconds:.3f} s, bare {bare_seconds:.3f} s")
        if number > 0:
            ours.append(our_seconds)
            bare.append(bare_seconds)
    client.destroy(sandbox)
    return [Figure("resume", median(ours), "s", median(bare), at_most(1.25))]
