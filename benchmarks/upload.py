"""``upload``: 100 MB as octet-stream through the API into a file, against the same over a raw virtio-serial port."""

from __future__ import annotations

import time

from benchmarks import transfer
from benchmarks.api_client import file_path
from benchmarks.figure import Figure, at_least, median
from benchmarks.progress import say
from benchmarks.stage import Stage


def measure(stage: Stage) -> list[Figure]:
    client, sandbox, port = stage.client, stage.sandbox, stage.raw_port
    data = transfer.payload()
    headers = {"Content-Type": "application/octet-stream"}
    ours: list[float] = []
    bare: list[float] = []
    for number in range(transfer.ROUNDS + 1):
        began = time.perf_counter()
        client.request("PUT", file_path(sandbox, transfer.GUEST_PATH), data, headers)
        between = time.perf_counter()
        port.ask(f"put {len(data)} {transfer.GUEST_PATH}", memoryview(data))
        ended = time.perf_counter()
        transfer.check_arrived(stage)
        transfer.remove_both(stage)
        our_rate = transfer.megabytes_per_second(between - began)
        bare_rate = transfer.megabytes_per_second(ended - between)
        say(f"upload: {our_rate:.1f} MB/s, bare {bare_rate:.1f} MB/s")
        if number > 0:
            ours.append(our_rate)
            bare.append(bare_rate)
    return [Figure("upload", median(ours), "MB/s", median(bare), at_least(0.8))]
