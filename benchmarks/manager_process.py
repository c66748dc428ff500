"""An Atelier of the benchmark's own: temporary data and run folder, a free port, ended in good order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.api_client import ApiClient

_START_SECONDS = 60.0
_STOP_SECONDS = 300.0


@dataclass(frozen=True)
class RunningManager:
    api_url: str
    api_key: str
    pid: int
    cache_dir: Path

    def client(self) -> ApiClient:
        return ApiClient(self.api_url, self.api_key)


@contextlib.contextmanager
def running_manager(
    folder: Path, mode: str, accelerator: str, cache_dir: Path, variables: Mapping[str, str] | None = None
) -> Generator[RunningManager]:
    """``variables`` are added to its environment. ``folder`` must be short: sockets lie in it. Raises RuntimeError with the manager's last words."""
    data_dir, log_path = folder / "data", folder / "manager.log"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATELIER_")}
    environment |= {
        "ATELIER_RUN_DIR": str(folder / "run"),
        "ATELIER_CACHE_DIR": str(cache_dir),
        "ATELIER_ACCELERATOR": accelerator,
        # What is measured has the machine to itself.
        "ATELIER_TEMPLATES": "off",
        "ATELIER_SSH_LISTEN": "127.0.0.1:0",
        **(variables or {}),
    }
    arguments = ["-P", "-m", "atelier.manager", "--mode", mode, "--data-dir", str(data_dir), "--listen", "127.0.0.1:0"]
    arguments += ["--on-exit", "destroy"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield _await_answer(process, data_dir, log_path, cache_dir)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise RuntimeError(f"the manager did not stop:\n{_tail(log_path)}") from None


def _await_answer(process: subprocess.Popen[bytes], data_dir: Path, log_path: Path, cache_dir: Path) -> RunningManager:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the manager ended with {process.returncode}:\n{_tail(log_path)}")
        with contextlib.suppress(OSError, ValueError, KeyError):
            token = json.loads((data_dir / "token.json").read_bytes())
            with urllib.request.urlopen(f"{token['api_url']}/health", timeout=5):
                return RunningManager(token["api_url"], token["api_key"], process.pid, cache_dir)
        time.sleep(0.02)
    raise RuntimeError(f"the manager did not answer:\n{_tail(log_path)}")


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:])


def resident_mib(pid: int) -> float:
    """Source: proc_pid_status(5), VmRSS in kB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmRSS")
