"""``atelier backup`` and ``atelier restore`` as programs, beside a manager in mock mode and without one."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.forked_programs import run_forked
from tests.running_manager import RunningManager, start_manager, stop_manager


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="atl-") as made:  # short: sockets lie below it
        yield Path(made)


@pytest.fixture
def running(folder: Path) -> Iterator[RunningManager]:
    started = start_manager(folder)
    with started.client() as client:
        client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "box"}).raise_for_status()
    yield started
    if started.process.poll() is None:
        stop_manager(started)


def atelier(data: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ATELIER_DATA_DIR": str(data)}
    words = ["atelier.cli", *arguments]
    done = run_forked(words, environment=environment, folder=data.parent)
    assert done.returncode == status, (done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    return subprocess.CompletedProcess(words, status, done.stdout.decode(), done.stderr.decode())


def test_a_backup_beside_a_running_manager_moves_to_a_new_machine(running: RunningManager, folder: Path) -> None:
    told = atelier(running.data_dir, "backup", "b.tar.gz").stdout
    assert "1 sandbox" in told and "the key" in told
    refused = atelier(running.data_dir, "restore", "b.tar.gz", status=1)
    assert "while a manager runs" in refused.stderr
    assert "hint: stop it first" in refused.stderr
    with running.client() as client:
        assert client.get("/api/v1/sandboxes/box").json()["state"] == "running", "it went on undisturbed"
    assert stop_manager(running) == 0

    other = folder / "other"
    other.mkdir()
    restored = json.loads(atelier(other / "data", "restore", str(folder / "b.tar.gz"), "--json").stdout)
    assert restored["replaced"] is None
    again = start_manager(other)
    try:
        assert again.key == running.key, "clients keep working"
        with again.client() as client:
            assert client.get("/api/v1/sandboxes/box").status_code == 200
    finally:
        stop_manager(again)


def test_a_backup_without_a_manager_and_back_in_its_place(running: RunningManager, folder: Path) -> None:
    running.process.kill()
    running.process.wait()
    data = running.data_dir
    made = json.loads(atelier(data, "--data-dir", str(data), "backup", str(folder / "b.tar.gz"), "--json").stdout)
    assert made["manifest"]["sandboxes"] == 1
    assert made["size_bytes"] == (folder / "b.tar.gz").stat().st_size
    told = atelier(data, "restore", "b.tar.gz").stdout
    assert "1 sandbox" in told and "atelier.db.replaced-" in told and "atelier up" in told
    again = start_manager(folder)
    with again.client() as client:
        assert [row["name"] for row in client.get("/api/v1/sandboxes").json()["items"]] == ["box"]
    assert stop_manager(again) == 0


def test_refusals_are_words_and_json(running: RunningManager, folder: Path) -> None:
    (folder / "b.tar.gz").write_text("dear")
    refused = atelier(running.data_dir, "backup", "b.tar.gz", status=1)
    assert refused.stderr.splitlines()[0].startswith("error: ") and "--force" in refused.stderr
    as_json = json.loads(atelier(running.data_dir, "backup", "b.tar.gz", "--json", status=1).stderr)
    assert (as_json["code"], set(as_json)) == ("file_exists", {"code", "message", "hint"})
    stop_manager(running)
    refused = atelier(running.data_dir, "restore", "b.tar.gz", status=1)
    assert "cannot be restored" in refused.stderr and "hint: nothing was changed" in refused.stderr


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_help_has_examples(folder: Path, command: str) -> None:
    assert f"atelier {command} atelier-backup.tar.gz" in atelier(folder / "data", command, "--help").stdout
