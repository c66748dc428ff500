"""``create_template``: from asking for a sandbox to the first ``true`` answered in it, restored from a template, against a
bare restore of the same template, identity included, to the same point."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from atelier.drivers.vmm.qemu_arguments import OpenMemory
from atelier.host.sealed_memory import sealed_copy
from atelier.model.machine import DiskFile
from benchmarks.bare_machine import SavedSide
from benchmarks.bare_restore import chain_of, restored_machine
from benchmarks.figure import Figure, at_most, median
from benchmarks.manager_process import running_manager
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 9
_TEMPLATE_SECONDS = 300.0


def measure(stage: Stage) -> list[Figure]:
    ingredients = stage.ingredients
    ours: list[float] = []
    bare: list[float] = []
    folder = stage.folder / "t"
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(
            running_manager(
                folder, "local", ingredients.accelerator, ingredients.cache_dir, {"ATELIER_TEMPLATES": "on"}
            )
        )
        client = stack.enter_context(manager.client())
        client.destroy(client.create("first"))
        template = _await_template(folder / "data")
        say(f"create_template: template {template} is ready")
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


def _await_template(data_dir: Path) -> str:
    """Id of the template that the first create has led to; it is in no list of the API's."""
    deadline = time.monotonic() + _TEMPLATE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.closing(sqlite3.connect(f"file:{data_dir / 'atelier.db'}?mode=ro", uri=True)) as database:
            ready = database.execute(
                "SELECT id FROM snapshots WHERE purpose = 'template' AND state = 'ready'"
            ).fetchone()
            left = database.execute("SELECT count(*) FROM sandboxes").fetchone()
        if ready is not None and left == (0,):
            return str(ready[0])
        time.sleep(0.2)
    raise TimeoutError("no template was made")
