"""``snapshot_stop``: how long the guest of a running sandbox stands still while a snapshot is taken of it, against bare pre-copy
that does the same: memory goes into a file while the guest runs, and when little is left the guest is quiesced over its raw
channel, stopped, its disk put under an overlay, the rest sent, and thawed.

In software emulation that baseline loses a store now and then (docs/adr/0014), so it is measured and must not be imitated.
What pre-copy alone would take, with nothing quiesced and no disk switched, is told beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from atelier.drivers.vmm.qemu_disks import find_disk
from atelier.drivers.vmm.qemu_migration import query_progress, run_on, send_state, wait_until
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.host.piped_file import piped_file
from atelier.model.machine import ROOT_DISK_SERIAL
from atelier.model.sandbox import DEFAULT_DISK_MIB
from benchmarks.bare_machine import BareMachine, bare_machine
from benchmarks.direct_channel import DirectChannel
from benchmarks.figure import Figure, at_most, median
from benchmarks.heartbeat import BEATING, longest_gap
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 5
"""And one that does not count: each snapshot makes the disk one file longer, and it has eight at most."""
_MIB = 1024 * 1024
_STREAM_LIMIT_BYTES = 2048 * _MIB
_HOLD_AT_BYTES, _LEFT_AT_STOP_BYTES = 64 * _MIB, 8 * _MIB
_PAGE_BYTES, _ZERO_PAGE_BYTES = 4096, 9
_DOWNTIME_MS = 50
_BETWEEN_SECONDS = 1.0


def measure(stage: Stage) -> list[Figure]:
    client = stage.client
    ours: list[float] = []
    bare: list[float] = []
    sandbox = client.create("beating")
    client.json("POST", f"/sandboxes/{sandbox}/run", {"command": BEATING, "user": "root"})
    (console,) = (stage.folder / "m" / "run").rglob(f"{sandbox}/console.log")
    with (
        bare_machine(stage.folder / "s", stage.ingredients) as machine,
        contextlib.closing(DirectChannel(machine.folder.guest_socket, token="")) as channel,
    ):
        channel.run(*BEATING, user="root")
        for number in range(ROUNDS + 1):
            undisturbed_seconds = _gap_while(machine.folder.console, lambda: None)
            alone_seconds = _gap_while(machine.folder.console, lambda: asyncio.run(_save_alone(machine)))
            overlay = _overlay(machine, number)
            bare_seconds = _gap_while(
                machine.folder.console, lambda overlay=overlay: asyncio.run(_save(machine, channel, overlay))
            )
            with longest_gap(console) as gap:
                path = f"/sandboxes/{sandbox}/snapshots?wait=true&timeout_seconds=300"
                snapshot = client.json("POST", path, {"name": f"still-{number}"})
                time.sleep(_BETWEEN_SECONDS)
            if snapshot["state"] != "ready":
                raise RuntimeError(f"the snapshot is {snapshot['state']}: {snapshot['failure']}")
            client.request("DELETE", f"/snapshots/{snapshot['id']}")
            say(
                f"snapshot_stop: {gap.seconds:.3f} s, of which the driver tells of {snapshot['stopped_ms'] / 1000:.3f} s; "
                f"bare {bare_seconds:.3f} s; pre-copy alone {alone_seconds:.3f} s; undisturbed {undisturbed_seconds:.3f} s"
            )
            if number > 0:
                ours.append(gap.seconds)
                bare.append(bare_seconds)
    client.destroy(sandbox)
    return [Figure("snapshot_stop", median(ours), "s", median(bare), at_most(1.5))]


def _gap_while(console: Path, work: Callable[[], None]) -> float:
    with longest_gap(console) as gap:
        work()
        time.sleep(_BETWEEN_SECONDS)
    return gap.seconds


def _overlay(machine: BareMachine, number: int) -> Path:
    overlay = machine.folder.root / f"overlay-{number}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), f"{DEFAULT_DISK_MIB}M"], check=True)
    return overlay


async def _save(machine: BareMachine, channel: DirectChannel, overlay: Path) -> None:
    stream_path = machine.folder.root / "held-stream"
    async with (
        await QmpConnection.open(machine.folder.control_socket) as control,
        piped_file(stream_path, limit_bytes=_STREAM_LIMIT_BYTES, held=True) as stream,
    ):
        present, _ = await find_disk(control, ROOT_DISK_SERIAL)
        file = {"driver": "file", "filename": str(overlay)}
        options = {"driver": "qcow2", "node-name": overlay.stem, "file": file, "backing": None}
        await control.execute("blockdev-add", options)
        await control.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 0})
        await send_state(control, stream.write_end, with_memory=True, pause_before_switchover=True)
        stream.handed_over()
        stream.let_through(_STREAM_LIMIT_BYTES)
        while (progress := await query_progress(control)).syncs < 1 or progress.remaining_bytes > _HOLD_AT_BYTES:
            await asyncio.sleep(0.001)
        quiescing = asyncio.create_task(asyncio.to_thread(channel.ask, "/atelier.v1.Control/Quiesce", {}))
        while not quiescing.done():
            # As much as cannot be all, though it were zeros.
            left_bytes = (await query_progress(control)).remaining_bytes - _LEFT_AT_STOP_BYTES
            stream.let_through(max(left_bytes, 0) // _PAGE_BYTES * _ZERO_PAGE_BYTES)
            await asyncio.wait([quiescing], timeout=0.002)
        await quiescing
        await control.execute("stop")
        stream.go_on()
        await control.execute("blockdev-snapshot", {"node": present, "overlay": overlay.stem})
        await wait_until(control, "pre-switchover")
        await _end(control)
        await asyncio.to_thread(channel.ask, "/atelier.v1.Control/Thaw", {})
        await stream.end()


async def _save_alone(machine: BareMachine) -> None:
    stream = machine.folder.root / "stream"
    stream.unlink(missing_ok=True)
    async with await QmpConnection.open(machine.folder.control_socket) as control:
        await control.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": _DOWNTIME_MS})
        descriptor = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await send_state(control, descriptor, with_memory=True, pause_before_switchover=True)
        finally:
            os.close(descriptor)
        await wait_until(control, "pre-switchover")
        await _end(control)


async def _end(control: QmpConnection) -> None:
    await control.execute("migrate-continue", {"state": "pre-switchover"})
    await wait_until(control, "completed")
    await run_on(control)
