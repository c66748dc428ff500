"""A manager as a process of its own, with everything it keeps below one folder of the test's."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.footprint import processes_naming
from tests.forked_programs import ForkedProgram, Program, run_forked
from tests.real_machines import NO_QEMU, REPOSITORY

from atelier.config.settings import load_settings
from atelier.model.states import UNDER_WAY

MANAGER = ("atelier.manager",)
Place = Callable[[Sequence[str]], list[str]]
"""From a forked program's words to those by which it runs in a place of the test's."""

WITH_TEMPLATES = {"ATELIER_TEMPLATES": "on"}
"""Variables for tests that need many guests and none of them booted: from the second on they are restored."""


@dataclass(frozen=True)
class RunningManager:
    url: str
    key: str
    data_dir: Path
    run_dir: Path
    log: Path
    environment: dict[str, str]
    process: Program

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=30,
            # No TLS is spoken, and reading all certificates takes longer than most requests.
            verify=False,
            **options,  # type: ignore[arg-type]
        )


def start_manager(
    folder: Path,
    *options: str,
    mode: str = "mock",
    program: Sequence[str] = MANAGER,
    variables: Mapping[str, str] | None = None,
    place: Place = list,
    forked: bool = True,
) -> RunningManager:
    """Start ``atelier.manager`` on a free port with everything of its own below ``folder``; ends by ``stop_manager``.
    ``program``: another module to run in its place, with the arguments that stand before the manager's. ``variables``
    are added to its environment. ``forked``: it is spared its imports (tests/forked_programs.py), and runs in ``place``."""
    environment, process = launch_manager(
        folder, *options, mode=mode, program=program, variables=variables, place=place, forked=forked
    )
    token_file = folder / "data" / "token.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the manager ended at once: {(folder / 'manager.log').read_text()}")
        try:
            token = json.loads(token_file.read_text())
            if httpx.get(f"{token['api_url']}/health", timeout=1, verify=False).status_code == 200:
                return RunningManager(
                    token["api_url"],
                    token["api_key"],
                    folder / "data",
                    folder / "run",
                    folder / "manager.log",
                    environment,
                    process,
                )
        except (OSError, ValueError, httpx.HTTPError):
            pass
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"the manager does not answer: {(folder / 'manager.log').read_text()}")


def launch_manager(
    folder: Path,
    *options: str,
    mode: str,
    program: Sequence[str],
    variables: Mapping[str, str] | None = None,
    place: Place = list,
    forked: bool = True,
) -> tuple[dict[str, str], Program]:
    """As ``start_manager``, without waiting for its answer: its environment and its process."""
    environment = {
        **os.environ,
        "ATELIER_DATA_DIR": str(folder / "data"),
        "ATELIER_RUN_DIR": str(folder / "run"),
        "ATELIER_SERVER_MODE": mode,
        # Which network there is should not hang on the machine.
        "ATELIER_NETWORK": "closed",
        "ATELIER_SSH_LISTEN": "127.0.0.1:0",
        "ATELIER_TEMPLATES": "off",
        # Disks of tests stay nearly empty, and how many there may be should not hang on the machine's.
        "ATELIER_DISK_OVERCOMMIT": "20",
        **(variables or {}),
    }
    environment.pop("ATELIER_API_KEY", None)
    environment.pop("ATELIER_API_URL", None)
    words = [*program, "--listen", "127.0.0.1:0", "--on-exit", "destroy", *options]
    with (folder / "manager.log").open("wb") as log:
        if forked:
            return environment, ForkedProgram(
                place(words), environment=environment, folder=REPOSITORY, output=log, errors=log
            )
        return environment, subprocess.Popen(
            [sys.executable, "-m", *words],
            env=environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def run_manager(
    environment: Mapping[str, str], *options: str, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """``atelier.manager`` where it is to end by itself. ``within``: the words before a command by which it runs in a place
    of the test's."""
    words = [*MANAGER, *options]
    if not within:
        done = run_forked(words, environment=environment, folder=REPOSITORY)
        return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())
    command = [*within, sys.executable, "-m", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def wait_for_template(manager: RunningManager) -> tuple[str, str]:
    """The ids of the first template and of the sandbox that it was made of, once it is ready and that one is gone. The
    manager was started with ``WITH_TEMPLATES`` and has created a sandbox."""

    def ready() -> tuple[str, str] | None:
        with closing(sqlite3.connect(f"file:{manager.data_dir / 'atelier.db'}?mode=ro", uri=True)) as database:
            return database.execute(
                "SELECT id, sandbox_id FROM snapshots WHERE purpose = 'template' AND state = 'ready'"
                " AND sandbox_id NOT IN (SELECT id FROM sandboxes)"
            ).fetchone()

    return wait_until(ready, 600)


def stop_manager(manager: RunningManager) -> int:
    manager.process.send_signal(signal.SIGINT)
    try:
        return manager.process.wait(60)
    except subprocess.TimeoutExpired:
        manager.process.kill()
        raise


class LocalInstallation:
    """Machines below one folder, real ones as a rule, whose manager may be killed, ended and started again by the
    test."""

    def __init__(
        self,
        folder: Path,
        *,
        mode: str = "local",
        program: Sequence[str] = MANAGER,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.mode = mode
        self.program = program
        self.variables = variables
        self.manager = self.start()

    def start(self, *options: str, program: Sequence[str] = ()) -> RunningManager:
        """A manager that leaves its sandboxes alone when it ends; ``program`` as for ``start_manager``."""
        self.manager = start_manager(
            self.folder,
            *("--on-exit", "keep", *options),
            mode=self.mode,
            program=program or self.program,
            variables=self.variables,
        )
        return self.manager

    def kill(self) -> None:
        self.manager.process.kill()
        self.manager.process.wait()

    def end(self) -> str:
        """End it in order; what it said."""
        self.manager.process.send_signal(signal.SIGTERM)
        assert self.manager.process.wait(120) == 0, self.manager.log.read_text()
        return self.manager.log.read_text()

    def call(self, method: str, path: str, body: object = None, *, expected: int = 200) -> dict[str, Any]:
        """One request to the API; its JSON."""
        with self.manager.client() as client:
            answer = client.request(method, f"/api/v1{path}", json=body, timeout=600)
        assert answer.status_code == expected, answer.text
        return answer.json() if answer.content else {}

    def create(self, name: str, **wishes: object) -> dict[str, Any]:
        path = "/sandboxes?wait=true&timeout_seconds=600"
        row = self.call("POST", path, {"name": name, "memory_mib": 256, **wishes}, expected=201)
        assert row["state"] == "running", row
        return row

    def run(self, name: str, script: str, *, user: str = "") -> str:
        """What a shell script prints in the sandbox; it must succeed."""
        body = {"command": ["sh", "-c", script], "user": user}
        result = self.call("POST", f"/sandboxes/{name}/run", body)
        assert result["exit_code"] == 0, result
        return str(result["stdout"])

    def wait_settled(self, name: str) -> dict[str, Any]:
        """Its row, once nothing is under way with it."""

        def settled() -> dict[str, Any] | None:
            row = self.call("GET", f"/sandboxes/{name}")
            return None if row["state"] in UNDER_WAY else row

        return wait_until(settled, 600)


def wait_until(true: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``true`` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(0.1)
    raise AssertionError("it has not come true")


@contextmanager
def local_installation(variables: Mapping[str, str] | None = None) -> Generator[LocalInstallation]:
    """An installation of its own; all of it is gone in the end, and nothing may be left. Skipped where there is no
    QEMU."""
    if NO_QEMU:
        pytest.skip(NO_QEMU)
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        made = LocalInstallation(Path(folder), variables=variables)
        try:
            yield made
        finally:
            if made.manager.process.poll() is None:
                made.kill()
            status = stop_manager(start_manager(Path(folder), mode="local"))
        assert status == 0
        left = list(made.manager.run_dir.rglob("*"))
        assert not made.manager.run_dir.exists(), f"sockets and folders are gone with the manager, but for {left}"
        assert list((Path(folder) / "data" / "volumes").glob("*.qcow2")) == []
        assert processes_naming(folder) == []


def cache_with_own_templates(folder: Path) -> Path:
    """A cache folder below ``folder`` with the images of the present one, and with no templates but those that are put
    there."""
    present, made = load_settings().cache_dir, folder / "cache"
    made.mkdir()
    for name in ("images", "kernel", "packages", "tools"):
        (present / name).mkdir(parents=True, exist_ok=True)
        (made / name).symlink_to(present / name)
    return made


@contextmanager
def running_local_manager(variables: Mapping[str, str] | None = None, place: Place = list) -> Generator[RunningManager]:
    """A manager of real machines in a folder of its own; the test is skipped where there is no QEMU."""
    if NO_QEMU:
        pytest.skip(NO_QEMU)
    # Short: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        running = start_manager(Path(folder), mode="local", variables=variables, place=place)
        try:
            yield running
        finally:
            status = stop_manager(running)
        assert status == 0
        assert not running.run_dir.exists(), "sockets and folders are gone with the manager"
