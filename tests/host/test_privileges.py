"""The privileged helper under a real sudo, for a user who is nobody else: what it grants, and what is refused how."""

from __future__ import annotations

import pytest
from tests.host.emulated_host import LVM_DISK, PYTHON, EmulatedHost

GROUP = "vg-test"
PROGRAM = "/usr/local/sbin/atelier-privileged"
_INSTALL = f"""
import asyncio
from pathlib import Path
from atelier.host_setup.access_changes import SudoersChange, helper_program
from atelier.host_setup.changes import FileChange
from atelier.host_setup.host import Host
from atelier.host_setup.root_settings import ROOT_SETTINGS, RootSettings, root_settings_text
from atelier.host_setup.thin_pool import ensure_thin_pool

async def main():
    await ensure_thin_pool("{GROUP}", "pool")
    host = Host()
    host.check_roots_own(Path("{PYTHON}"))
    told = root_settings_text(RootSettings("atelier", "aaaa", "{GROUP}", "pool"))
    for change in (FileChange(str(ROOT_SETTINGS), told), helper_program(Path("{PYTHON}")), SudoersChange("atelier")):
        await change.apply(host, None, lambda record: None)

asyncio.run(main())
"""
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
def host(shared_host: EmulatedHost) -> EmulatedHost:
    shared_host.run(
        "useradd --system --user-group --create-home --home-dir /srv/atelier atelier && useradd --system --user-group somebody"
    )
    shared_host.run(f"vgs {GROUP} || (pvcreate -q {LVM_DISK} && vgcreate -q {GROUP} {LVM_DISK})")
    shared_host.run(f"{PYTHON} -", given=_INSTALL.encode())
    return shared_host


def ask(host: EmulatedHost, before: str = "") -> str:
    return host.run(f"cd /srv/atelier && {before} {PYTHON} -", user="atelier", given=_AS_USER.encode()).out


def test_as_an_ordinary_user_a_volume_is_made_and_is_that_users_alone(host: EmulatedHost) -> None:
    host.run("visudo -c")
    assert "made /dev/atelier/aaaa/volume-bbbbbbbbbbbb ['bbbbbbbbbbbb']" in ask(host)
    node = "/dev/atelier/aaaa/volume-bbbbbbbbbbbb"
    assert host.run(f"stat -c '%U %a' {node}").out == "atelier 600\n"
    assert host.run(f"head -c 5 {node}", user="somebody", check=False).status != 0
    assert host.run(f"head -c 5 /dev/{GROUP}/at-aaaa-volume-bbbbbbbbbbbb").out == "WORDS"
    assert host.run(f"head -c 5 /dev/{GROUP}/at-aaaa-volume-bbbbbbbbbbbb", user="atelier", check=False).status != 0


@pytest.mark.parametrize(
    "words",
    [
        f"{PROGRAM}",
        f"{PROGRAM} storage vmm",
        f"{PROGRAM} 'storage '",
        f"{PROGRAM} disks",
        "/usr/sbin/lvremove -y vg-test/pool",
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
