"""``atelier user``, ``key``, ``share`` and ``audit`` against a manager."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import httpx
import pytest
from tests.api.cli_program import Cli
from tests.running_manager import RunningManager


@pytest.fixture
def cli(manager: RunningManager, tmp_path: Path) -> Cli:
    return Cli(manager, tmp_path)


def test_people_and_their_keys(cli: Cli, manager: RunningManager, sandbox: str) -> None:
    email = f"kim-{secrets.token_hex(4)}@example.org"
    user = json.loads(cli.run("user", "add", email, "--name", "Kim", "--json").stdout)
    assert email in cli.run("user", "ls").stdout.decode()
    assert json.loads(cli.run("user", "whoami", "--json").stdout)["role"] == "admin"
    key = (
        cli.run("key", "create", "ci", "--for", email, "--scope", "read", "--expires-in", "1d").stdout.decode().strip()
    )
    headers = {"X-API-Key": key}

    def look() -> int:
        return httpx.get(f"{manager.url}/api/v1/sandboxes/{sandbox}", headers=headers, verify=False).status_code

    assert look() == 404
    assert email in cli.run("share", sandbox, "--with", email).stdout.decode()
    assert look() == 200
    assert json.loads(cli.run("share", sandbox, "--stop", email, "--json").stdout) == []
    assert look() == 404
    assert b"as admin" in cli.run("user", "role", email, "admin").stdout
    cli.run("user", "role", email, "member")
    cli.run("user", "disable", email)
    assert look() == 401
    cli.run("user", "enable", email)
    assert look() == 404
    listed = json.loads(cli.run("key", "ls", "--all", "--json").stdout)
    (key_id,) = [each["id"] for each in listed if each["user_id"] == user["id"]]
    cli.run("key", "revoke", key_id)
    assert look() == 401
    entries = json.loads(cli.run("audit", "--operation", "change_user", "--json").stdout)
    assert [each["subject"] for each in entries[:4]] == [email] * 4
    assert "revoke_api_key" in cli.run("audit").stdout.decode()
    assert cli.run("user", "link").stdout.decode().startswith(f"{manager.url}/sign-in/first-run?secret=")
