"""Forks of a sandbox, and clones of a bare machine, beside each other: what ``fork_20`` and ``fork_pss`` share.

Timed on both sides: the guest is quiesced, its machine stopped and saved, memory and state are baked into an image, and 20
machines are restored over it, each with an identity of its own, until each has answered a ``true``. As many are started at
a time as the manager starts. Not timed: the first machine's boot, and the end of the forks.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.api_client import ApiClient
from benchmarks.bare_fork import cloned_machines
from benchmarks.bare_machine import Ingredients, bare_machine
from benchmarks.direct_channel import DirectChannel
from benchmarks.manager_process import running_manager
from benchmarks.progress import say

COUNT = 20
ROUNDS = 5
MEMORY_MIB = 256
AT_A_TIME = max(2, os.cpu_count() or 1)
"""As the manager's boots."""
_FORK_SECONDS = 600
_ROUNDS_SECONDS = 3600


@dataclass(frozen=True)
class ForkSample:
    """Of one round: for all forks, and the mean of theirs."""

    seconds: float
    pss_mib: float


@dataclass(frozen=True)
class ForkSamples:
    ours: list[ForkSample]
    bare: list[ForkSample]


def measure_forks(ingredients: Ingredients, folder: Path) -> ForkSamples:
    samples = ForkSamples([], [])
    # A small host has no room for all their disks, should they all be filled.
    variables = {"ATELIER_DISK_OVERCOMMIT": "10"}
    with (
        running_manager(folder, "local", ingredients.accelerator, ingredients.cache_dir, variables) as manager,
        manager.client() as client,
        bare_machine(folder / "parent", ingredients, memory_mib=MEMORY_MIB) as machine,
        contextlib.closing(
            DirectChannel(machine.folder.guest_socket, token="", timeout_seconds=_ROUNDS_SECONDS)
        ) as channel,
    ):
        parent = client.create("forked", memory_mib=MEMORY_MIB)
        client.run(parent, "/bin/true")
        channel.run("/bin/true")
        for number in range(ROUNDS + 1):
            began = time.perf_counter()
            with cloned_machines(
                folder / f"r{number}", ingredients, machine, channel, MEMORY_MIB, COUNT, AT_A_TIME
            ) as clones:
                seconds = time.perf_counter() - began
                bare = ForkSample(seconds, _mean_pss_mib([each.pid for each in clones]))
            ours = _fork(client, parent)
            say(
                f"forks: {ours.seconds:.2f} s, {ours.pss_mib:.1f} MiB; bare {bare.seconds:.2f} s, {bare.pss_mib:.1f} MiB"
            )
            if number > 0:
                samples.ours.append(ours)
                samples.bare.append(bare)
    return samples


def _fork(client: ApiClient, parent: str) -> ForkSample:
    began = time.perf_counter()
    body = {"count": COUNT}
    path = f"/sandboxes/{parent}/fork?wait=true&timeout_seconds={_FORK_SECONDS}"
    forks = [each["id"] for each in client.json("POST", path, body)["items"]]

    def answer(sandbox: str) -> None:
        with client.another() as own:
            own.run(sandbox, "/bin/true")

    with ThreadPoolExecutor(AT_A_TIME) as threads:
        list(threads.map(answer, forks))
    sample = ForkSample(time.perf_counter() - began, _mean_pss_mib([_vmm_pid(fork) for fork in forks]))
    for fork in forks:
        client.destroy(fork)
    return sample


def _mean_pss_mib(pids: list[int]) -> float:
    """Source: proc_pid_smaps(5), smaps_rollup, Pss in kB."""
    found: list[float] = []
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")))
    return statistics.fmean(found)


def _vmm_pid(sandbox: str) -> int:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"-name" in words and words[words.index(b"-name") + 1].endswith(f"-{sandbox}".encode()):
                return int(entry.name)
    raise RuntimeError(f"sandbox {sandbox} has no VMM")
