"""What the manager's side of the privileged helper says when sudo, the helper, or what it did went wrong."""

from __future__ import annotations

import asyncio
import getpass
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atelier.host.privilege import Privileges
from atelier.model.errors import DiskFullError, HostError, MissingProgramError, NotFoundError

SUDO = """#!/bin/sh
printf '%s\n' "$*" >>{folder}/asked
[ ! -e {folder}/refuses ] || {{ cat {folder}/refuses >&2; exit 1; }}
[ "$1 $2" = "-n --" ] || exit 1
shift 2
exec "$@"
"""
PROGRAM = """#!{python}
import json, os, sys, time
print(json.dumps({{"protocol": {protocol}, "group": sys.argv[1:]}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    match request["verb"]:
        case "echo":
            time.sleep(request.get("seconds", 0))
            answer = request
        case "fail":
            answer = {{"error": {{"kind": request["kind"], "code": "c", "message": "m", "hint": "h"}}}}
        case "die":
            sys.exit("atelier-privileged: last words")
        case "babble":
            print("no JSON", flush=True)
            continue
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """First in PATH, with a sudo that writes down what it is asked."""
    write_program(tmp_path / "sudo", SUDO.format(folder=tmp_path))
    write_program(tmp_path / "helper", PROGRAM.format(python=sys.executable, protocol=1))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
async def privileges(folder: Path) -> AsyncIterator[Privileges]:
    asking = Privileges("storage", program=folder / "helper", use_sudo=True)
    yield asking
    await asking.close()


async def test_requests_go_through_one_sudo_and_come_back(privileges: Privileges, folder: Path) -> None:
    answers = await asyncio.gather(*(privileges.ask("echo", number=number) for number in range(20)))
    assert [answer["number"] for answer in answers] == list(range(20))
    assert (folder / "asked").read_text() == f"-n -- {folder}/helper storage\n"


async def test_who_is_root_needs_no_sudo(folder: Path) -> None:
    asking = Privileges("vmm", program=folder / "helper", use_sudo=False)
    assert (await asking.ask("echo"))["verb"] == "echo"
    await asking.close()
    assert not (folder / "asked").exists()


@pytest.mark.parametrize(
    ("kind", "error"), [("DiskFullError", DiskFullError), ("NotFoundError", NotFoundError), ("Exception", HostError)]
)
async def test_an_error_of_roots_side_is_raised_as_its_kind(
    privileges: Privileges, kind: str, error: type[Exception]
) -> None:
    with pytest.raises(HostError if error is HostError else error) as refusal:
        await privileges.ask("fail", kind=kind)
    assert type(refusal.value) is error
    assert (refusal.value.code, refusal.value.message, refusal.value.hint) == ("c", "m", "h")  # type: ignore[attr-defined]


async def test_a_missing_entry_is_named_with_the_command_that_mends_it(privileges: Privileges, folder: Path) -> None:
    (folder / "refuses").write_text("sudo: a password is required\n")
    with pytest.raises(HostError) as refusal:
        await privileges.ask("echo")
    assert refusal.value.code == "privilege_missing"
    assert f"{getpass.getuser()} ALL=(root:root) NOPASSWD: {folder}/helper storage" in refusal.value.message
    assert "a password is required" in refusal.value.message
    assert "atelier host init" in refusal.value.hint
    (folder / "refuses").unlink()
    assert await privileges.ask("echo"), "mended, it works without a restart"


async def test_no_new_privileges_are_told_apart_from_a_missing_entry(privileges: Privileges, folder: Path) -> None:
    (folder / "refuses").write_text(
        'sudo: The "no new privileges" flag is set, which prevents sudo from running as root.\n'
    )
    with pytest.raises(HostError) as refusal:
        await privileges.ask("echo")
    assert refusal.value.code == "privilege_missing"
    assert "NoNewPrivileges" in refusal.value.hint


async def test_without_sudo_or_helper_it_is_named(
    privileges: Privileges, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingProgramError, match="helper"):
        await Privileges("storage", program=folder / "no-helper", use_sudo=False).ask("echo")
    (folder / "sudo").unlink()
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(MissingProgramError, match="sudo"):
        await privileges.ask("echo")


async def test_a_helper_of_another_version_is_refused(privileges: Privileges, folder: Path) -> None:
    write_program(folder / "helper", PROGRAM.format(python=sys.executable, protocol=999))
    with pytest.raises(HostError) as refusal:
        await privileges.ask("echo")
    assert refusal.value.code == "privilege_outdated"
    assert "atelier host update" in refusal.value.hint


@pytest.mark.parametrize("verb", ["die", "babble"])
async def test_a_helper_that_ends_or_babbles_is_told_and_started_anew(privileges: Privileges, verb: str) -> None:
    with pytest.raises(HostError) as refusal:
        await privileges.ask(verb)
    assert refusal.value.code == "privilege_lost"
    if verb == "die":
        assert "last words" in refusal.value.message
    assert (await privileges.ask("echo", number=1))["number"] == 1


async def test_an_answer_that_nobody_waits_for_is_not_the_next_ones(privileges: Privileges) -> None:
    await privileges.ask("echo")
    given_up = asyncio.create_task(privileges.ask("echo", number=1, seconds=0.3))
    await asyncio.sleep(0.05)
    given_up.cancel()
    assert (await privileges.ask("echo", number=2))["number"] == 2
    with pytest.raises(asyncio.CancelledError):
        await given_up
