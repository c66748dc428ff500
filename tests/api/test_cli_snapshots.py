"""``atelier`` pause, resume, snapshot, fork, snapshots and create --snapshot, against a manager in mock mode."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.running_manager import RunningManager

from .cli_program import Cli


@pytest.fixture
def cli(manager: RunningManager, api: httpx.Client, tmp_path: Path) -> Iterator[Cli]:
    yield Cli(manager, tmp_path)
    for path in ("sandboxes", "snapshots"):
        for each in reversed(api.get(f"/api/v1/{path}").json()["items"]):
            api.delete(f"/api/v1/{path}/{each['id']}", params={"wait": True})


@pytest.fixture
def box(cli: Cli, api: httpx.Client) -> str:
    api.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "box"}).raise_for_status()
    return "box"


def as_json(done: subprocess.CompletedProcess[bytes]) -> Any:
    return json.loads(done.stdout)


def state(cli: Cli, name: str) -> str:
    return as_json(cli.run("get", "--json", name))["state"]


def test_pause_and_resume_take_several_and_go_on_after_a_failure(cli: Cli, box: str) -> None:
    cli.run("create", "--name", "other")
    done = cli.run("pause", box, "absent", "other", status=1)
    assert done.stdout == b"box\nother\n"
    assert b"absent" in done.stderr and b"hint: " in done.stderr
    assert b"it is paused" in cli.run("pause", box, status=1).stderr
    assert b" paused " in cli.run("ls").stdout
    found = as_json(cli.run("resume", "--json", box, "absent", status=1))
    assert [(each["name"], each["state"]) for each in found["resumed"]] == [("box", "running")]
    assert [(each["name"], each["code"]) for each in found["failed"]] == [("absent", "sandbox_not_found")]
    assert b"it is running" in cli.run("resume", box, status=1).stderr
    cli.run("exec", "-n", "other", "true")
    assert state(cli, "other") == "running", "its use woke it"
    cli.run("pause", "other")
    assert cli.run("resume", "--from-disk", "other").stdout == b"other\n"
    assert cli.run("pause", "--no-wait", "other").stdout == b"other\n"


def test_snapshot_and_create_from_it(cli: Cli, box: str) -> None:
    assert cli.run("snapshots").stdout == b"no snapshots; take one with `atelier snapshot`\n"
    assert cli.run("snapshot", box, "ready", "--label", "job=7").stdout == b"ready\n"
    taken = as_json(cli.run("snapshot", box, "--json"))
    assert taken["state"] == "ready"
    assert b"there is a snapshot named ready" in cli.run("snapshot", box, "ready", status=1).stderr
    made = as_json(cli.run("create", "--name", "other", "--snapshot", "ready", "--disk", "8G", "--json"))
    assert made["disk_mib"] == 8192
    ready = as_json(cli.run("snapshots", "get", "ready", "--json"))
    assert (made["snapshot_id"], ready["labels"]) == (ready["id"], {"job": "7"})
    assert f"snapshot {ready['id']}".encode() in cli.run("get", "other").stdout
    shown = cli.run("snapshots", "get", "ready").stdout
    for words in (b"taken of   box", b"512 MiB, ", b" stored", b"job=7"):
        assert words in shown, shown
    assert cli.run("create", "--name", "booted", "--snapshot", "ready", "--disk-only", "--memory", "1G").stdout
    assert b"--snapshot" in cli.run("create", "--disk-only", status=2).stderr
    assert b"comes from the snapshot ready" in cli.run("create", "--snapshot", "ready", "--cpus", "2", status=1).stderr
    assert b"no snapshot" in cli.run("create", "--snapshot", "absent", status=1).stderr


def test_list_tree_and_delete(cli: Cli, box: str) -> None:
    cli.run("snapshot", box, "one")
    cli.run("create", "--name", "other", "--snapshot", "one")
    cli.run("snapshot", "other", "below")
    cli.run("snapshot", box, "two")
    assert cli.run("snapshots", "ls", "-q").stdout == b"one\nbelow\ntwo\n"
    tree = [line.split("  ")[0] for line in cli.run("snapshots", "ls", "--tree").stdout.decode().splitlines()[1:]]
    assert tree == ["one", "├─ below", "└─ two"]
    listed = as_json(cli.run("snapshots", "ls", "--json", "--sandbox", box))
    assert [each["name"] for each in listed] == ["one", "two"]
    assert cli.run("snapshots", "ls", "--label", "a=b").stdout == b"no snapshots of that kind\n"
    done = as_json(cli.run("snapshots", "rm", "one", "two", "absent", "--json", status=1))
    assert done["removed"] == ["two"]
    assert [(each["name"], each["code"]) for each in done["failed"]] == [
        ("one", "snapshot_in_use"),
        ("absent", "snapshot_not_found"),
    ]
    refused = cli.run("snapshots", "rm", "one", status=1).stderr
    assert b"sandbox other" in refused and b"snapshot below" in refused and b"atelier rm" in refused
    assert cli.run("snapshots", "rm", "-f", "absent").stdout == b"absent\n"
    cli.run("snapshot", "other", "--keep-last", "1")
    deadline = time.monotonic() + 60
    while b"below" in cli.run("snapshots", "ls", "-q").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_fork(cli: Cli, box: str) -> None:
    assert cli.run("fork", box, "--count", "3").stdout == b"box-1\nbox-2\nbox-3\n"
    found = as_json(cli.run("fork", box, "--name-prefix", "worker", "--label", "job=7", "--json"))
    assert [(each["name"], each["state"], each["labels"]) for each in found] == [("worker-1", "running", {"job": "7"})]
    for count in ("0", "-1"):
        assert b"count" in cli.run("fork", box, "--count", count, status=1).stderr
    full = cli.run("fork", box, "--count", "9999", "--json", status=1)
    assert as_json_error(full)["code"] == "insufficient_capacity"
    assert "would fit" in as_json_error(full)["message"]
    cli.run("stop", box)
    assert b"start or resume it" in cli.run("fork", box, status=1).stderr
    assert cli.run("fork", "worker-1", "--no-wait").stdout == b"worker-1-1\n"


def as_json_error(done: subprocess.CompletedProcess[bytes]) -> dict[str, str]:
    return json.loads(done.stderr)
