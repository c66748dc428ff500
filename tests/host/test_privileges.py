"""The privileged helper under a real sudo, as ``atelier host init`` installed it, for a user who is nobody else: what it
grants, and what is refused how."""

from __future__ import annotations

import json

import pytest
from tests.host.emulated_host import PYTHON, EmulatedHost
from tests.host.production_host import GROUP

PROGRAM = "/usr/local/sbin/atelier-privileged"
VOLUME = "bbbbbbbbbbbb"
_AS_USER = """
import asyncio, os, sys
from pathlib import Path
from atelier.drivers.storage.lvm_thin import LvmThinStorage
from atelier.host.privilege import Privileges
from atelier.model.errors import AtelierError
from atelier.model.machine import DiskFile, VolumeRequest

async def main():
    privileges = Privileges("storage")
    storage = LvmThinStorage(privileges)
    base = Path("base.img")
    base.write_bytes(b"words" + bytes(8 * 2**20 - 5))
    disk = await storage.ensure_volume(VolumeRequest("bbbbbbbbbbbb", DiskFile(base.absolute(), "raw"), 16))
    with disk.top.path.open("r+b", buffering=0) as device:
        assert device.read(5).lower() == b"words"
        device.seek(0)
        device.write(b"WORDS".ljust(512))
    print("made", disk.top.path, await storage.list_volumes())
    await privileges.close()

try:
    asyncio.run(main())
except AtelierError as error:
    print(error.code, "|", error.message, "|", error.hint)
"""


@pytest.fixture(scope="module")
def host(production_host: EmulatedHost) -> EmulatedHost:
    """With another user, and without a manager that would call the tests' volume left over."""
    production_host.run("systemctl stop atelier-manager && useradd --system --user-group somebody")
    production_host.run("install -d -o atelier /srv/atelier")
    return production_host


def ask(host: EmulatedHost, before: str = "") -> str:
    return host.run(f"cd /srv/atelier && {before} {PYTHON} -", user="atelier", given=_AS_USER.encode()).out


def test_as_an_ordinary_user_a_volume_is_made_and_is_that_users_alone(host: EmulatedHost) -> None:
    host.run("visudo -c")
    installation = json.loads(host.read("/etc/atelier/privileged.json"))["installation_id"]
    node, volume = f"/dev/atelier/{installation}/volume-{VOLUME}", f"/dev/{GROUP}/at-{installation}-volume-{VOLUME}"
    assert f"made {node} ['{VOLUME}']" in ask(host)
    assert host.run(f"stat -c '%U %a' {node}").out == "atelier 600\n"
    assert host.run(f"head -c 5 {node}", user="somebody", check=False).status != 0
    assert host.run(f"head -c 5 {volume}").out == "WORDS"
    assert host.run(f"head -c 5 {volume}", user="atelier", check=False).status != 0


@pytest.mark.parametrize(
    "words",
    [
        f"{PROGRAM}",
        f"{PROGRAM} storage vmm",
        f"{PROGRAM} 'storage '",
        f"{PROGRAM} disks",
        f"/usr/sbin/lvremove -y {GROUP}/atelier",
        "/bin/sh -c id",
        f"-u somebody {PROGRAM} storage",
        f"PYTHONPATH=/srv/atelier {PROGRAM} storage",
    ],
)
def test_sudo_starts_nothing_else(host: EmulatedHost, words: str) -> None:
    refused = host.run(f"sudo -n {words} </dev/null", user="atelier", check=False)
    assert refused.status == 1
    assert "sudo:" in refused.err


def test_nobody_elses_python_is_imported_by_root(host: EmulatedHost) -> None:
    host.run('mkdir -p /srv/atelier/atelier && echo \'open("/tmp/harm", "w")\' >/srv/atelier/atelier/__init__.py')
    try:
        host.run(f"cd /srv/atelier && PYTHONPATH=/srv/atelier sudo -n {PROGRAM} storage </dev/null", user="atelier")
        assert host.run("test ! -e /tmp/harm").status == 0
    finally:
        host.run("rm -r /srv/atelier/atelier")


def test_a_missing_entry_is_told_with_what_mends_it(host: EmulatedHost) -> None:
    host.run("mv /etc/sudoers.d/atelier /root/entries")
    try:
        code, message, hint = ask(host).split(" | ")
    finally:
        host.run("mv /root/entries /etc/sudoers.d/atelier")
    assert code == "privilege_missing"
    assert f"atelier ALL=(root:root) NOPASSWD: {PROGRAM} storage" in message
    assert "atelier host init" in hint
    assert "made" in ask(host)


def test_no_new_privileges_are_told(host: EmulatedHost) -> None:
    code, _, hint = ask(host, "setpriv --no-new-privs").split(" | ")
    assert code == "privilege_missing"
    assert "NoNewPrivileges" in hint
