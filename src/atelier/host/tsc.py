"""The rate of this machine's time-stamp counter, which an emulated guest sees as its own.

Called by the QEMU driver: QEMU's ``microvm`` machine has no timer against which the guest kernel could measure the rate
itself, so the kernel has to be told. Needs no privilege. x86-64 only.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import platform
import time
from collections.abc import Callable
from pathlib import Path

from atelier.host.files import write_atomically
from atelier.host.processes import boot_id
from atelier.model.errors import HostError

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_COUNTER = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_WINDOW_SECONDS = 0.1
_SAMPLES = 40


def cached_tsc_khz(cache_file: Path) -> int:
    """As ``measure_tsc_khz``, measured once per boot: the answer is kept in ``cache_file``."""
    try:
        kept = json.loads(cache_file.read_bytes())
        if kept["boot_id"] == boot_id():
            return int(kept["tsc_khz"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # absent or spoilt: measured anew
    tsc_khz = measure_tsc_khz()
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cache_file, json.dumps({"boot_id": boot_id(), "tsc_khz": tsc_khz}).encode(), durable=False)
    return tsc_khz


def measure_tsc_khz() -> int:
    """Counter ticks per millisecond, right to about 10 ppm. Blocks for 0.1 s.

    Raises HostError on a machine that is not x86-64 or forbids executable memory.
    """
    if platform.machine() != "x86_64":
        raise HostError(f"Atelier runs guests on x86-64 machines; this one is {platform.machine()}")
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as error:
        raise HostError(
            f"the rate of the time-stamp counter cannot be measured: {error.strerror}",
            hint="a security module forbids executable anonymous memory to this program",
        ) from error
    page.write(_READ_COUNTER)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    # The function type holds no reference to the page; this frame does.
    read_counter: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    first_ns, first_ticks = _sample(read_counter)
    time.sleep(_WINDOW_SECONDS)
    second_ns, second_ticks = _sample(read_counter)
    return round((second_ticks - first_ticks) * 1_000_000 / (second_ns - first_ns))


def _sample(read_counter: Callable[[], int]) -> tuple[float, int]:
    """(clock in ns, counter) of one moment: the tightest of several tries, since any of them may be interrupted."""
    best_width_ns: int | None = None
    best = (0.0, 0)
    for _ in range(_SAMPLES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = read_counter()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if best_width_ns is None or after - before < best_width_ns:
            best_width_ns = after - before
            best = ((before + after) / 2, ticks)
    return best
