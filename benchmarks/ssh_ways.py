"""The ways into one sandbox by the real ssh program: relayed by the gateway, spliced by it, and without its SSH."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.figure import Figure, at_least, median
from benchmarks.stage import Stage

ROUNDS = 5
_PAYLOAD_BYTES = 40_000_000
_CHUNK_BYTES = 256 * 1024


class SshWays:
    """``relayed``, ``spliced`` and ``direct`` are command lines; what is to be run is appended."""

    def __init__(self, stage: Stage) -> None:
        folder = stage.folder / "ssh"
        folder.mkdir(exist_ok=True)
        key = folder / "key"
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
            public_key = key.with_suffix(".pub").read_text()
            stage.client.request("POST", "/ssh-keys", {"public_key": public_key})
        address = json.loads(stage.client.request("GET", "/ssh")[1])
        if not address["port"]:
            raise RuntimeError(address["problem"])
        line = " ".join(key.with_suffix(".pub").read_text().split()[:2])
        channel = next((stage.folder / "m").rglob(f"{stage.sandbox}.sock"))
        config = folder / "config"
        config.write_text(
            f"Host *\n    IdentityFile {key}\n    IdentitiesOnly yes\n    IdentityAgent none\n    LogLevel ERROR\n"
            "    StrictHostKeyChecking no\n    UserKnownHostsFile /dev/null\n    Compression no\n"
            f"Host relayed\n    HostName 127.0.0.1\n    Port {address['port']}\n    User {stage.sandbox}\n"
            f"Host jump\n    HostName 127.0.0.1\n    Port {address['port']}\n    User _\n"
            f"Host {stage.sandbox}\n    User user\n    ProxyJump jump\n"
            f"Host direct\n    User user\n    ProxyUseFdpass yes\n"
            f"    ProxyCommand {sys.executable} -m benchmarks.ssh_direct {channel} '{line}'\n"
        )
        self.relayed, self.spliced, self.direct = (
            ["ssh", "-F", str(config), name] for name in ("relayed", stage.sandbox, "direct")
        )


def compare(name: str, ours: list[str], direct: list[str], least: float) -> list[Figure]:
    """Bytes from the guest, from the first to the last of them, interleaved with the same without the gateway's SSH."""
    there: list[float] = []
    bare: list[float] = []
    for _ in range(ROUNDS):
        there.append(_megabytes_per_second(ours))
        bare.append(_megabytes_per_second(direct))
    return [Figure(name, median(there), "MB/s", median(bare), at_least(least))]


def _megabytes_per_second(way: list[str]) -> float:
    with subprocess.Popen([*way, f"head -c {_PAYLOAD_BYTES} /dev/zero"], stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        first = received = len(process.stdout.read(_CHUNK_BYTES))
        began = time.perf_counter()
        while piece := process.stdout.read(_CHUNK_BYTES):
            received += len(piece)
        seconds = time.perf_counter() - began
    if received != _PAYLOAD_BYTES or process.returncode != 0:
        raise RuntimeError(f"{received} of {_PAYLOAD_BYTES} bytes came")
    return (received - first) / 1e6 / seconds


def echo_ms(ways: Sequence[list[str]], keys: int) -> list[list[float]]:
    """How long each of ``keys`` bytes takes to the guest and back, by each of the ways in turn."""
    found: list[list[float]] = [[] for _ in ways]
    with contextlib.ExitStack() as stack:
        open_ways = [
            stack.enter_context(
                subprocess.Popen([*way, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            )
            for way in ways
        ]
        for _ in range(keys):
            for process, samples in zip(open_ways, found, strict=True):
                assert process.stdin is not None
                assert process.stdout is not None
                began = time.perf_counter()
                process.stdin.write(b"x")
                if process.stdout.read(1) != b"x":
                    raise RuntimeError("the echo was lost")
                samples.append((time.perf_counter() - began) * 1000)
        for process in open_ways:
            assert process.stdin is not None
            process.stdin.close()
    return found
