"""``atelier network``, and the network in ``create`` and ``get``, against a manager in mock mode."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.running_manager import RunningManager

from .cli_program import Cli


@pytest.fixture
def cli(manager: RunningManager, api: httpx.Client, tmp_path: Path) -> Cli:
    del api  # destroys what a test leaves
    return Cli(manager, tmp_path)


@pytest.fixture
def box(cli: Cli, api: httpx.Client) -> str:
    api.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "box"}).raise_for_status()
    return "box"


def lines(done: subprocess.CompletedProcess[bytes]) -> list[list[str]]:
    return [line.split() for line in done.stdout.decode().splitlines()]


def policy(done: subprocess.CompletedProcess[bytes]) -> dict:
    return json.loads(done.stdout)["policy"]


def test_show_allow_deny(cli: Cli, box: str) -> None:
    assert lines(cli.run("network", "show", box))[0] == ["egress", "all"]
    assert lines(cli.run("network", "deny", box, "--all"))[0] == ["egress", "none"]
    shown = lines(cli.run("network", "allow", box, "github.com", "10.1.0.0/16"))
    assert shown[:3] == [["egress", "list"], ["allowed", "github.com"], ["10.1.0.0/16"]]
    assert policy(cli.run("network", "deny", box, "github.com", "--json"))["egress"] == {
        "mode": "list",
        "networks": ["10.1.0.0/16"],
        "domains": [],
    }
    opened = policy(cli.run("network", "allow", box, "--all", "--json"))["egress"]
    assert (opened["mode"], opened["networks"]) == ("all", ["10.1.0.0/16"])
    assert policy(cli.run("network", "deny", box, "--unlisted", "--json"))["egress"]["mode"] == "list"
    assert json.loads(cli.run("network", "show", "--json", box).stdout)["in_force"] is True


def test_limit(cli: Cli, box: str) -> None:
    shown = cli.run("network", "limit", box, "--download", "10mbit", "--upload", "1.5mbit")
    assert ["limits", "download", "10mbit,", "upload", "1.5mbit"] in lines(shown)
    left = policy(cli.run("network", "limit", box, "--upload", "none", "--json"))
    assert (left["download_kbit_per_second"], left["upload_kbit_per_second"]) == (10_000, None)


def test_create_and_get(cli: Cli) -> None:
    cli.run("create", "--name", "one", "--allow", "*.github.com", "--allow", "203.0.113.7", "--download", "512kbit")
    assert policy(cli.run("network", "show", "--json", "one")) == {
        "egress": {"mode": "list", "networks": ["203.0.113.7/32"], "domains": ["*.github.com"]},
        "download_kbit_per_second": 512,
        "upload_kbit_per_second": None,
    }
    shown = lines(cli.run("get", "one"))
    assert ["egress", "list", "(*.github.com,", "203.0.113.7/32)"] in shown
    assert ["rates", "download", "512kbit"] in shown
    cli.run("create", "--name", "two", "--egress", "none")
    assert ["egress", "none"] in lines(cli.run("get", "two"))
    cli.run("create", "--name", "three", "--egress", "all", "--allow", "10.0.0.0/8")
    assert ["egress", "all", "and", "10.0.0.0/8"] in lines(cli.run("get", "three"))


def test_what_is_refused_says_what_to_do(cli: Cli, box: str) -> None:
    for arguments, said in (
        (("allow", box, "github.com"), b"mode list first"),
        (("allow", box, "10.0.0.1/8"), b"did you mean 10.0.0.0/8?"),
        (("deny", box, "github.com"), b"not listed"),
        (("show", "absent"), b"there is no sandbox 'absent'"),
    ):
        failed = cli.run("network", *arguments, status=1)
        assert failed.stdout == b""
        assert said in failed.stderr
    refused = json.loads(cli.run("network", "deny", "--json", box, "github.com", status=1).stderr)
    assert (refused["code"], bool(refused["hint"])) == ("egress_entry_not_found", True)
    failed = cli.run("create", "--name", "x", "--egress", "all", "--allow", "github.com", status=1)
    assert b"takes no domains" in failed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("network", "allow", "box"),
        ("network", "deny", "box"),
        ("network", "deny", "box", "github.com", "--all"),
        ("network", "limit", "box"),
        ("network", "limit", "box", "--upload", "10"),
        ("create", "--egress", "none", "--allow", "github.com"),
        ("create", "--egress", "some"),
        ("create", "--download", "none"),
    ],
    ids=" ".join,
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli.run(*arguments, status=2).stdout == b""


def test_its_help_is_fast() -> None:
    """Reading the commands loads neither the client nor the words of policies."""
    program = (
        "import sys, atelier.cli.__main__, atelier.cli.commands.network, atelier.cli.commands.create\n"
        "print([name for name in ('pydantic', 'httpx', 'ipaddress', 'atelier.client') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
