"""``download``: 100 MB as octet-stream through the API out of a file, against the same over a raw virtio-serial port."""

from __future__ import annotations

import hashlib
import time

from benchmarks import transfer
from benchmarks.api_client import file_path
from benchmarks.figure import Figure, at_least, median
from benchmarks.progress import say
from benchmarks.stage import Stage


def measure(stage: Stage) -> list[Figure]:
    client, sandbox, port = stage.client, stage.sandbox, stage.raw_port
    data = transfer.payload()
    client.request("PUT", file_path(sandbox, transfer.GUEST_PATH), data, {"Content-Type": "application/octet-stream"})
    port.ask(f"put {len(data)} {transfer.GUEST_PATH}", memoryview(data))
    transfer.check_arrived(stage)
    target, raw_target = bytearray(transfer.PAYLOAD_BYTES), bytearray(transfer.PAYLOAD_BYTES)
    ours: list[float] = []
    bare: list[float] = []
    for number in range(transfer.ROUNDS + 1):
        began = time.perf_counter()
        client.receive_into(file_path(sandbox, transfer.GUEST_PATH), memoryview(target))
        between = time.perf_counter()
        if port.ask(f"get {transfer.GUEST_PATH}") != str(transfer.PAYLOAD_BYTES):
            raise RuntimeError("the raw guest has another file")
        port.receive_into(memoryview(raw_target))
        ended = time.perf_counter()
        for received in (target, raw_target):
            if hashlib.sha256(received).hexdigest() != transfer.payload_digest():
                raise RuntimeError("the payload changed on its way")
        our_rate = transfer.megabytes_per_second(between - began)
        bare_rate = transfer.megabytes_per_second(ended - between)
        say(f"download: {our_rate:.1f} MB/s, bare {bare_rate:.1f} MB/s")
        if number > 0:
            ours.append(our_rate)
            bare.append(bare_rate)
    transfer.remove_both(stage)
    return [Figure("download", median(ours), "MB/s", median(bare), at_least(0.8))]
