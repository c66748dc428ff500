"""The manager as a program: what it refuses to start with, and what it leaves when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.disturbed_manager import MODULE
from tests.lifecycle.sabotage import Place
from tests.running_manager import RunningManager, run_manager, start_manager, stop_manager, wait_until

from atelier.model.states import UNDER_WAY


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="atl-") as made:  # short: sockets lie below it
        yield Path(made)


def test_a_second_manager_on_the_same_data_is_refused(manager: RunningManager) -> None:
    second = run_manager(manager.environment, "--listen", "127.0.0.1:0")
    assert second.returncode == 1
    assert second.stderr.startswith("error: ")
    assert "hint: " in second.stderr
    assert httpx.get(f"{manager.url}/health").status_code == 200, "the first one goes on"


def test_a_taken_port_is_named(folder: Path) -> None:
    environment = {**os.environ, "ATELIER_DATA_DIR": str(folder / "data"), "ATELIER_RUN_DIR": str(folder / "run")}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run_manager(environment, "--mode", "mock", "--listen", f"127.0.0.1:{port}")
    assert refused.returncode == 1
    assert f"127.0.0.1:{port} is in use" in refused.stderr
    assert "--listen" in refused.stderr
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--mode", "imaginary", "local, mock"),
        ("--listen", "nonsense", "ADDRESS:PORT"),
        ("--listen", "127.0.0.1:99999", ""),
    ],
)
def test_wrong_settings_are_refused_in_words(folder: Path, option: str, value: str, words: str) -> None:
    environment = {**os.environ, "ATELIER_DATA_DIR": str(folder / "data"), "ATELIER_RUN_DIR": str(folder / "run")}
    refused = run_manager(environment, option, value)
    assert refused.returncode == 1
    assert value in refused.stderr
    assert words in refused.stderr
    assert list(folder.iterdir()) == []


def test_an_end_that_is_to_destroy_the_sandboxes_does_and_says_so(folder: Path) -> None:
    running = start_manager(folder, "--on-exit", "destroy")
    with running.client() as client:
        client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "left-over"}).raise_for_status()
    assert stop_manager(running) == 0
    assert "destroyed sandbox left-over" in running.log.read_text()
    assert not running.run_dir.exists()
    again = start_manager(folder)
    try:
        assert again.key == running.key, "the key outlives the manager"
        with again.client() as client:
            assert client.get("/api/v1/sandboxes").json()["items"] == []
    finally:
        stop_manager(again)


def test_an_end_that_is_to_stop_the_sandboxes_does_and_says_so(folder: Path) -> None:
    running = start_manager(folder, "--on-exit", "stop")
    with running.client() as client:
        client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "tired"}).raise_for_status()
    assert stop_manager(running) == 0
    assert "stopped sandbox tired" in running.log.read_text()
    assert not running.run_dir.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_end_leaves_the_sandboxes_to_the_next_manager(folder: Path, number: signal.Signals) -> None:
    """The machines of mock mode end with their manager, as all do when the host is rebooted: they boot again."""
    # In an interpreter of its own, with the signals as that found them.
    running = start_manager(folder, "--on-exit", "keep", forked=number == signal.SIGKILL)
    with running.client() as client:
        for name in ("busy", "resting"):
            client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": name}).raise_for_status()
        client.post("/api/v1/sandboxes/resting/stop", params={"wait": True}).raise_for_status()
        before = {row["id"] for row in client.get("/api/v1/sandboxes").json()["items"]}
    running.process.send_signal(number)
    assert running.process.wait(60) == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    if number != signal.SIGKILL:
        assert "sandbox busy goes on running" in running.log.read_text()
        assert "atelier down" in running.log.read_text()
    again = start_manager(folder)
    try:
        with again.client() as client:
            deadline = time.monotonic() + 60
            while client.get("/api/v1/sandboxes/busy").json()["state"] != "running":
                assert time.monotonic() < deadline, again.log.read_text()
                time.sleep(0.05)
            rows = client.get("/api/v1/sandboxes").json()["items"]
            assert {row["id"] for row in rows} == before
            assert {row["name"]: row["state"] for row in rows} == {"busy": "running", "resting": "stopped"}
            client.post("/api/v1/sandboxes/resting/start", params={"wait": True}).raise_for_status()
    finally:
        stop_manager(again)


@pytest.mark.parametrize(("what", "states"), [("stop", ["stopped"]), ("destroy", [])])
def test_sandboxes_are_ended_where_no_manager_runs(folder: Path, what: str, states: list[str]) -> None:
    running = start_manager(folder, "--on-exit", "keep")
    with running.client() as client:
        client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "left"}).raise_for_status()
    refused = run_manager(running.environment, "--down", what)
    assert refused.returncode == 1
    assert "already in use by another manager" in refused.stderr
    stop_manager(running)
    # Who listens where this manager did, is nobody's business.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_manager(running.environment, "--down", what, "--listen", f"127.0.0.1:{port}")
    assert done.returncode == 0, done.stderr
    assert {"stop": "stopped", "destroy": "destroyed"}[what] + " sandbox left" in done.stderr
    again = start_manager(folder)
    try:
        with again.client() as client:
            assert [row["state"] for row in client.get("/api/v1/sandboxes").json()["items"]] == states
    finally:
        stop_manager(again)


def test_a_killed_manager_leaves_nothing_that_the_next_one_does_not_settle(folder: Path) -> None:
    """Fake machines live in the manager's memory and fake disks do not: it is as after a reboot of the host."""
    running = start_manager(folder)
    with running.client() as client:
        client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "found"}).raise_for_status()
        client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "lost"}).raise_for_status()
        lost = client.get("/api/v1/sandboxes/lost").json()["id"]
    running.process.kill()
    running.process.wait()
    (volume,) = (folder / "data" / "volumes").glob(f"{lost}*")
    volume.unlink()
    again = start_manager(folder)
    try:
        with again.client() as client:
            rows = {name: settled(client, name) for name in ("found", "lost")}
            assert {name: row["state"] for name, row in rows.items()} == {"found": "running", "lost": "failed"}
            assert rows["lost"]["failure"]["code"] == "volume_lost"
            for name in rows:
                assert client.delete(f"/api/v1/sandboxes/{name}", params={"wait": True}).status_code == 204
    finally:
        stop_manager(again)
    assert list((folder / "data" / "volumes").iterdir()) == []


def settled(client: httpx.Client, name: str) -> dict[str, Any]:
    def row() -> dict[str, Any] | None:
        found = client.get(f"/api/v1/sandboxes/{name}").json()
        return None if found["state"] in UNDER_WAY else found

    return wait_until(row)


@pytest.fixture(params=[30])
def stopping(request: pytest.FixtureRequest, folder: Path) -> Iterator[RunningManager]:
    """A manager that was told to end while it creates the sandbox ``late``, and waits for that, as many seconds as the
    parameter says."""
    flag = folder / "in-the-step"
    place = Place("sandbox_create", "guest_ready", "do", "before")
    action = f"hold={flag},drain={request.param}"
    running = start_manager(folder, "--on-exit", "keep", program=(MODULE, action, str(place)))
    try:
        with running.client() as client:
            client.post("/api/v1/sandboxes", json={"name": "late"}).raise_for_status()
        wait_until(flag.exists)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "no new requests" in running.log.read_text())
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(1)
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def test_an_end_waits_for_what_is_under_way(stopping: RunningManager, folder: Path) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{stopping.url}/health", verify=False)
    (folder / "in-the-step").unlink()
    assert stopping.process.wait(60) == 0
    assert "sandbox late goes on running" in stopping.log.read_text()


@pytest.mark.parametrize("stopping", [5], indirect=True)
def test_an_end_does_not_wait_for_ever(stopping: RunningManager, folder: Path) -> None:
    assert stopping.process.wait(60) == 0
    assert "nothing goes on running" in stopping.log.read_text()
    check_the_next_goes_on(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interruption_ends_it_at_once(stopping: RunningManager, folder: Path, number: signal.Signals) -> None:
    began = time.monotonic()
    stopping.process.send_signal(number)
    assert stopping.process.wait(60) == -number
    assert time.monotonic() - began < 15, "it would have waited for half a minute"
    assert "Traceback" not in stopping.log.read_text()
    check_the_next_goes_on(folder)


def check_the_next_goes_on(folder: Path) -> None:
    again = start_manager(folder)
    try:
        with again.client() as client:
            assert settled(client, "late")["state"] == "running"
    finally:
        assert stop_manager(again) == 0


def test_doctor_answers_without_a_manager(folder: Path) -> None:
    environment = {**os.environ, "ATELIER_DATA_DIR": str(folder / "data"), "ATELIER_RUN_DIR": str(folder / "run")}
    answer = run_manager(environment, "--mode", "local", "--doctor", "--json")
    checks = {check["name"]: check for check in json.loads(answer.stdout)["checks"]}
    assert {"qemu-system-x86_64", "mmdebstrap", "kvm", "memory", "listen address"} <= set(checks)
    failed = [check for check in checks.values() if check["status"] == "failed"]
    assert answer.returncode == (1 if failed else 0)
    assert all(check["remedy"] for check in failed)
    assert not (folder / "data").exists(), "it only looks"


def test_doctor_names_the_remedy_for_missing_programs(folder: Path) -> None:
    environment = {"ATELIER_DATA_DIR": str(folder / "data"), "ATELIER_RUN_DIR": str(folder / "run"), "PATH": "/nowhere"}
    answer = run_manager(environment, "--mode", "local", "--doctor")
    assert answer.returncode == 1
    assert "apt-get install qemu-system-x86" in answer.stdout
