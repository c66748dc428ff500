"""``atelier`` stop, start, restart, resize, retry, extend, down and doctor --reclaim, against managers in mock mode."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tests.running_manager import RunningManager, start_manager, stop_manager

from .cli_program import Cli


@pytest.fixture
def cli(manager: RunningManager, api: httpx.Client, tmp_path: Path) -> Cli:
    del api  # destroys what a test leaves
    return Cli(manager, tmp_path)


@pytest.fixture
def box(cli: Cli, api: httpx.Client) -> str:
    api.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "box"}).raise_for_status()
    return "box"


def as_json(done: subprocess.CompletedProcess[bytes]) -> dict:
    return json.loads(done.stdout)


def state(cli: Cli, name: str) -> str:
    return as_json(cli.run("get", "--json", name))["state"]


# -- stop, start, restart -----------------------------------------------------------------------------------------


def test_stop_and_start_take_several_and_go_on_after_a_failure(cli: Cli, box: str) -> None:
    cli.run("create", "--name", "other")
    done = cli.run("stop", box, "absent", "other", "box", "--grace", "5", status=1)
    assert done.stdout == b"box\nother\n"
    assert b"error: " in done.stderr and b"absent" in done.stderr and b"hint: " in done.stderr
    assert state(cli, box) == "stopped"
    found = as_json(cli.run("start", "--json", box, "absent", status=1))
    assert [(each["name"], each["state"]) for each in found["started"]] == [("box", "running")]
    assert [(each["name"], each["code"]) for each in found["failed"]] == [("absent", "sandbox_not_found")]
    assert found["failed"][0]["hint"]


def test_what_cannot_be_is_said_with_the_remedy(cli: Cli, box: str) -> None:
    assert b"it is running" in cli.run("start", box, status=1).stderr
    assert b"nothing is stuck" in cli.run("retry", box, status=1).stderr
    cli.run("stop", box)
    for command in ("stop", "restart"):
        assert b"it is stopped" in cli.run(command, box, status=1).stderr
    for arguments in (("exec", "-n", box, "true"), ("exec", "-n", "--json", box, "true")):
        assert b"atelier start box" in cli.run(*arguments, status=125).stderr


def test_restart_without_waiting(cli: Cli, box: str) -> None:
    before = as_json(cli.run("get", "--json", box))["updated_at"]
    assert cli.run("restart", box).stdout == b"box\n"
    assert as_json(cli.run("get", "--json", box))["updated_at"] > before
    assert state(cli, box) == "running"
    assert cli.run("stop", "--no-wait", box).stdout == b"box\n"


def test_logs_of_a_stopped_sandbox_are_those_of_its_last_run(cli: Cli, box: str) -> None:
    cli.run("stop", box)
    assert b"started" in cli.run("logs", box).stdout


# -- resize and time limits ---------------------------------------------------------------------------------------


def test_resize(cli: Cli, box: str) -> None:
    assert cli.run("resize", box, "8G").stdout == b"box  disk 8 GiB\n"
    assert as_json(cli.run("resize", "--json", box, "8192M"))["disk_mib"] == 8192
    refused = cli.run("resize", box, "4096", status=1).stderr
    assert b"cannot shrink" in refused and b"hint: " in refused
    cli.run("resize", box, "8X", status=2)


def test_limits_are_set_shown_and_taken_away(cli: Cli) -> None:
    cli.run("create", "--name", "box", "--expires-in", "80m", "--stop-when-idle", "1h30m")
    expires_at = datetime.fromisoformat(as_json(cli.run("get", "--json", "box"))["expires_at"])
    assert timedelta(minutes=78) < expires_at - datetime.now(UTC) < timedelta(minutes=80)
    for command in (("ls",), ("get", "box")):
        shown = cli.run(*command).stdout
        assert b"expires in 1h " in shown and b"stops when idle for 1h 30m" in shown
    assert cli.run("extend", "box", "2h").stdout.startswith(b"box  expires in ")
    extended = as_json(cli.run("extend", "box", "1d", "--stop-when-idle", "never", "--json"))
    assert extended["auto_stop_after_idle_seconds"] is None
    assert datetime.fromisoformat(extended["expires_at"]) - expires_at > timedelta(hours=22)
    assert cli.run("extend", "box", "never").stdout == b"box  no time limits\n"
    assert cli.run("extend", "box", "--stop-when-idle", "20m").stdout == b"box  stops when idle for 20m\n"
    assert b"idle" in cli.run("create", "--stop-when-idle", "1s", status=1).stderr
    for wrong in (("box",), ("box", "1y"), ("box", "0s"), ("box", "5"), ("box", "")):
        cli.run("extend", *wrong, status=2)


# -- down, and disks without a sandbox ----------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Cli]]:
    """Starts a manager of the test's own, each time on the same data folder."""
    running: list[RunningManager] = []
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:  # short: sockets lie below it

        def begin(*options: str) -> Cli:
            running.append(start_manager(Path(folder), *options))
            return Cli(running[-1], tmp_path)

        yield begin
        for each in running:
            if each.process.poll() is None:
                stop_manager(each)


def test_down_stops_all_and_waits_for_the_end(start: Callable[..., Cli]) -> None:
    cli = start()
    for name in ("one", "two", "resting"):
        cli.run("create", "--name", name)
    cli.run("stop", "resting")
    done = cli.run("down")
    assert done.stdout == b"one\ntwo\n"
    assert b"nothing goes on running" in done.stderr
    assert cli.manager.process.wait(10) == 0
    assert not cli.manager.run_dir.exists()
    assert b"no manager answers" in cli.run("ls", status=1).stderr
    again = start()
    assert {each["state"] for each in as_json(again.run("ls", "--json"))} == {"stopped"}
    again.run("start", "one")
    assert as_json(again.run("down", "--destroy", "--yes", "--json")) == {
        "destroyed": ["one", "resting", "two"],
        "running": [],
    }


def test_down_asks_before_it_destroys(start: Callable[..., Cli]) -> None:
    cli = start()
    cli.run("down", "--destroy", status=2)
    cli.run("down", "--destroy", "--keep", status=2)
    session = cli.open_terminal("down", "--destroy")
    try:
        session.expect(rb"Destroy all sandboxes.*\[y/N\]")
        session.type(b"n\n")
        assert session.wait() == 130
    finally:
        session.close()
    assert cli.manager.process.poll() is None


def test_down_without_a_manager_does_the_same(start: Callable[..., Cli]) -> None:
    cli = start()
    cli.run("create", "--name", "left")
    # Told over the API, the manager's own --on-exit counts no more.
    kept = cli.run("down", "--keep")
    assert b"still running: left" in kept.stderr
    assert cli.manager.process.wait(10) == 0
    token = (cli.manager.data_dir / "token.json").read_bytes()
    assert b"stopped sandbox left" in cli.run("down").stderr
    assert as_json(cli.run("down", "--json")) == {"stopped": [], "running": []}
    assert (cli.manager.data_dir / "token.json").read_bytes() == token
    again = start()
    assert state(again, "left") == "stopped"
    again.run("down", "--keep")
    assert b"destroyed sandbox left" in again.run("down", "--destroy", "--yes").stderr
    assert list((cli.manager.data_dir / "volumes").iterdir()) == []


def test_down_where_nothing_ever_was(cli: Cli, tmp_path: Path) -> None:
    done = cli.run("--data-dir", str(tmp_path / "none"), "down")
    assert b"no manager runs" in done.stderr
    assert not (tmp_path / "none").exists()


def test_doctor_lists_and_removes_disks_without_a_sandbox(start: Callable[..., Cli]) -> None:
    cli = start("--on-exit", "keep")
    cli.run("create", "--name", "lost")
    cli.run("create", "--name", "kept")
    lost = as_json(cli.run("get", "--json", "lost"))["id"]
    assert b"every volume, memory and snapshot belongs to somebody" in cli.run("doctor", "--reclaim").stdout
    cli.run("down")
    assert b"atelier up" in cli.run("doctor", "--reclaim", status=1).stderr
    file = cli.manager.data_dir / "volumes" / f"{lost}.fake.json"
    content = file.read_bytes()
    cli = start("--on-exit", "keep")
    cli.run("rm", "lost")
    cli.run("down")
    file.write_bytes(content)  # as after the restore of a folder

    cli = start()
    listed = cli.run("doctor", "--reclaim")
    assert f"volume/{lost}".encode() in listed.stdout and b"1, 200.0 KiB" in listed.stdout
    assert b"--yes" in listed.stderr
    assert file.exists(), "it is only listed"
    assert as_json(cli.run("doctor", "--reclaim", "--json"))["total_bytes"] == 200 * 1024
    cli.run("doctor", "--reclaim", "--yes", "--only", f"memory/{lost}", status=2)
    assert file.exists(), "something else was asked for"
    assert as_json(cli.run("doctor", "--reclaim", "--yes", "--only", f"volume/{lost}", "--json"))["removed"] == [
        f"volume/{lost}"
    ]
    assert not file.exists()
    assert len(list(file.parent.iterdir())) == 1
    cli.run("doctor", "--yes", status=2)
