"""``snapshot_stop``: how long the guest of a running sandbox stands still while a snapshot is taken of it, against bare
pre-copy into a file: nothing quiesced, no disk switched, memory sent while the guest runs.

In software emulation that baseline loses a store now and then (docs/adr/0014), so it is measured and must not be imitated.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

from atelier.drivers.vmm.qemu_migration import run_on, send_state, wait_until
from atelier.drivers.vmm.qmp import QmpConnection
from benchmarks.bare_machine import BareMachine, bare_machine
from benchmarks.direct_channel import DirectChannel
from benchmarks.figure import Figure, at_most, median
from benchmarks.heartbeat import BEATING, longest_gap
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 5
"""And one that does not count: each snapshot makes the disk one file longer, and it has eight at most."""
_DOWNTIME_MS = 50
_BETWEEN_SECONDS = 1.0


def measure(stage: Stage) -> list[Figure]:
    client = stage.client
    ours: list[float] = []
    bare: list[float] = []
    sandbox = client.create("beating")
    client.json("POST", f"/sandboxes/{sandbox}/run", {"command": BEATING, "user": "root"})
    (console,) = (stage.folder / "m" / "run").rglob(f"{sandbox}/console.log")
    stream = stage.folder / "stream"
    with (
        bare_machine(stage.folder / "s", stage.ingredients) as machine,
        contextlib.closing(DirectChannel(machine.folder.guest_socket, token="")) as channel,
    ):
        channel.run(*BEATING, user="root")
        for number in range(ROUNDS + 1):
            with longest_gap(machine.folder.console) as gap:
                time.sleep(_BETWEEN_SECONDS)
            undisturbed_seconds = gap.seconds
            with longest_gap(machine.folder.console) as gap:
                asyncio.run(_save(machine, stream))
                time.sleep(_BETWEEN_SECONDS)
            stream.unlink()
            bare_seconds = gap.seconds
            with longest_gap(console) as gap:
                path = f"/sandboxes/{sandbox}/snapshots?wait=true&timeout_seconds=300"
                snapshot = client.json("POST", path, {"name": f"still-{number}"})
                time.sleep(_BETWEEN_SECONDS)
            if snapshot["state"] != "ready":
                raise RuntimeError(f"the snapshot is {snapshot['state']}: {snapshot['failure']}")
            client.request("DELETE", f"/snapshots/{snapshot['id']}")
            say(
                f"snapshot_stop: {gap.seconds:.3f} s, of which the driver tells of {snapshot['stopped_ms'] / 1000:.3f} s; "
                f"bare {bare_seconds:.3f} s; undisturbed {undisturbed_seconds:.3f} s"
            )
            if number > 0:
                ours.append(gap.seconds)
                bare.append(bare_seconds)
    client.destroy(sandbox)
    return [Figure("snapshot_stop", median(ours), "s", median(bare), at_most(1.5))]


async def _save(machine: BareMachine, target: Path) -> None:
    async with await QmpConnection.open(machine.folder.control_socket) as control:
        await control.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": _DOWNTIME_MS})
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await send_state(control, descriptor, with_memory=True, pause_before_switchover=True)
        finally:
            os.close(descriptor)
        await wait_until(control, "pre-switchover")
        await control.execute("migrate-continue", {"state": "pre-switchover"})
        await wait_until(control, "completed")
        await run_on(control)
