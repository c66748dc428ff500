"""What a running manager has on the host: its processes, their memory, and what bears a sandbox's name."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.running_manager import RunningManager

_SAMPLE_SECONDS = 0.05
_MACHINE = b"qemu-system-x86_64"


def processes_naming(text: str) -> list[str]:
    """Command lines of all other processes in which ``text`` stands."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found


def paths_below(folder: Path) -> list[Path]:
    """All files and folders below ``folder``, while others of them come and go, which ``rglob`` does not bear."""
    return [Path(parent) / name for parent, folders, files in os.walk(folder) for name in (*folders, *files)]


def paths_naming(text: str, *folders: Path) -> list[Path]:
    """Those below ``folders`` with ``text`` in their own name."""
    return [path for folder in folders for path in paths_below(folder) if text in path.name]


def vmm_pids(sandbox_id: str) -> list[int]:
    """Of a sandbox's virtual machines: one, as a rule."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if _MACHINE in line and sandbox_id.encode() in line:
                found.append(int(entry.name))
    return found


def left_of(manager: RunningManager, sandbox_id: str) -> list[str]:
    """Every process and file that is still named after a sandbox; empty once it is gone."""
    files = paths_naming(sandbox_id, manager.run_dir, manager.data_dir)
    return processes_naming(sandbox_id) + [str(path) for path in files]


def ask_gateway(manager: RunningManager, operation: str, **fields: str) -> dict:
    (control,) = manager.run_dir.glob("*/gateway.sock")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(control))
        connection.sendall(json.dumps({"operation": operation, **fields}).encode() + b"\n")
        return json.loads(connection.makefile().readline())


def gateway_pid(manager: RunningManager) -> int:
    return int(ask_gateway(manager, "ping")["pid"])


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Samples the resident memory of processes, by name, from ``with`` to its end. ``growth_bytes`` is the most that
    each had beyond what it had at the beginning."""

    def __init__(self, **pids: int) -> None:
        self._pids = pids
        self.before = {name: resident_bytes(pid) for name, pid in pids.items()}
        self.peak = dict(self.before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def growth_bytes(self, name: str) -> int:
        return self.peak[name] - self.before[name]

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def __str__(self) -> str:
        mib = 2**20
        return ", ".join(
            f"{name} {self.before[name] / mib:.1f} -> at most {self.peak[name] / mib:.1f} MiB" for name in self._pids
        )

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            for name, pid in self._pids.items():
                self.peak[name] = max(self.peak[name], resident_bytes(pid))
