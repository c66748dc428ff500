"""An older backup restored under running guests: the one it knows is found again undisturbed, the newer one's machine
ends and its disk is kept, until the newer database is back or somebody lets go of the disk."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.footprint import vmm_pids
from tests.forked_programs import run_forked
from tests.leftovers import traces_of
from tests.running_manager import LocalInstallation, local_installation

BACKUP = "older.tar.gz"


@pytest.fixture
def installation() -> Iterator[LocalInstallation]:
    with local_installation() as made:
        yield made


def atelier(installation: LocalInstallation, *arguments: str) -> str:
    done = run_forked(
        ["atelier.cli", *arguments],
        environment=installation.manager.environment,
        folder=installation.folder,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def orphans(installation: LocalInstallation) -> list[str]:
    return [each["id"] for each in installation.call("GET", "/host/orphans")["items"]]


def names(installation: LocalInstallation) -> list[str]:
    return [row["name"] for row in installation.call("GET", "/sandboxes")["items"]]


def test_a_restored_older_backup_costs_nobody_a_disk(installation: LocalInstallation) -> None:
    first = installation.create("first")["id"]
    installation.run("first", "echo of the first >/home/user/file; nohup sleep 98765 >/dev/null 2>&1 &")
    pids = vmm_pids(first)
    atelier(installation, "backup", BACKUP)
    second = installation.create("second")["id"]
    installation.run("second", "echo of the second >/home/user/file; sync")
    volume = installation.manager.data_dir / "volumes" / f"{second}.qcow2"

    def check_first() -> None:
        row = installation.call("GET", "/sandboxes/first")
        assert (row["id"], row["state"]) == (first, "running")
        assert vmm_pids(first) == pids
        assert installation.run("first", "cat /home/user/file; pgrep -c sleep") == "of the first\n1\n"

    # The second is not in the backup.
    installation.end()
    told = atelier(installation, "restore", BACKUP)
    assert "stay in the data folder" in told and second in told
    (newer,) = installation.manager.data_dir.glob("atelier.db.replaced-*")
    (machine,) = vmm_pids(second)
    # So that its disk stands still before its machine is ended.
    os.kill(machine, signal.SIGSTOP)
    before = digest(volume)
    installation.start()
    assert names(installation) == ["first"]
    check_first()
    assert vmm_pids(second) == []
    assert traces_of(installation.folder, second) == [f"volumes: {volume}"]
    assert orphans(installation) == [second]
    assert digest(volume) == before

    # The newer database comes back, and the second with it.
    installation.end()
    newer.rename(installation.manager.data_dir / "atelier.db")
    installation.start()
    assert sorted(names(installation)) == ["first", "second"]
    check_first()
    assert orphans(installation) == []
    row = installation.call("GET", "/sandboxes/second")
    assert (row["state"], row["failure"]["code"]) == ("failed", "vmm_ended")
    assert digest(volume) == before
    installation.call("POST", "/sandboxes/second/start?wait=true")
    assert installation.run("second", "cat /home/user/file") == "of the second\n"

    # Without it again, for good this time.
    installation.end()
    atelier(installation, "restore", BACKUP)
    installation.start()
    check_first()
    assert orphans(installation) == [second]
    refused = installation.call("DELETE", f"/host/orphans/volume/{first}", expected=409)
    assert refused["code"] == "not_an_orphan"
    installation.call("DELETE", f"/host/orphans/volume/{second}", expected=204)
    assert orphans(installation) == []
    assert traces_of(installation.folder, second) == []
    check_first()
