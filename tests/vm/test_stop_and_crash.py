"""Real guests stopped, started, resized, cut off, and left alone by managers that die: nothing is lost, nothing leaks."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.footprint import paths_naming, processes_naming, vmm_pids
from tests.running_manager import WITH_TEMPLATES, LocalInstallation, local_installation, wait_until


@pytest.fixture(scope="module")
def installation() -> Iterator[LocalInstallation]:
    with local_installation(WITH_TEMPLATES) as made:
        made.create("box", disk_mib=4608)
        yield made


def disk_size_mib(installation: LocalInstallation, name: str) -> int:
    return int(installation.run(name, "df -BM --output=size / | tail -1").strip().rstrip("M"))


def test_stop_keeps_the_disk_which_may_grow_and_start_brings_it_all_back(installation: LocalInstallation) -> None:
    row = installation.call("GET", "/sandboxes/box")
    # Not fsync-ed by the writer: an orderly stop loses nothing all the same.
    installation.run("box", "seq 1 100000 >/home/user/kept; cat /etc/machine-id >/home/user/machine-id")
    stopped = installation.call("POST", "/sandboxes/box/stop?wait=true")
    assert (stopped["state"], stopped["stop_reason"]) == ("stopped", "requested")
    assert vmm_pids(row["id"]) == []
    assert paths_naming(row["id"], installation.manager.run_dir) == []
    refused = installation.call("POST", "/sandboxes/box/run", {"command": ["true"]}, expected=409)
    assert "atelier start" in refused["hint"]
    installation.call("POST", "/sandboxes/box/resize?wait=true", {"disk_mib": 5120})

    started = installation.call("POST", "/sandboxes/box/start?wait=true")
    assert (started["state"], started["stop_reason"], started["id"]) == ("running", None, row["id"])
    assert installation.run("box", "wc -l </home/user/kept; hostname").split() == ["100000", "box"]
    installation.run("box", "cmp /etc/machine-id /home/user/machine-id")
    assert len(vmm_pids(row["id"])) == 1
    assert 5120 * 0.9 < disk_size_mib(installation, "box") <= 5120


def test_a_disk_grows_live(installation: LocalInstallation) -> None:
    before = disk_size_mib(installation, "box")
    grown = installation.call("POST", "/sandboxes/box/resize?wait=true", {"disk_mib": 6144})
    assert (grown["state"], grown["disk_mib"], grown["failure"]) == ("running", 6144, None)
    live = disk_size_mib(installation, "box")
    assert 6144 * 0.9 < live <= 6144
    assert live > before
    # What lies beyond the old end can be written and read.
    installation.run("box", "fallocate -l 5200M /home/user/big && sync && rm /home/user/big")
    smaller = installation.call("POST", "/sandboxes/box/resize", {"disk_mib": 4608}, expected=422)
    assert smaller["code"] == "disk_cannot_shrink"


def test_a_restart_is_one_piece_of_work(installation: LocalInstallation) -> None:
    installation.run("box", "echo here >/home/user/after-restart; cat /proc/sys/kernel/random/boot_id >/home/user/boot")
    row = installation.call("POST", "/sandboxes/box/restart?wait=true")
    assert row["state"] == "running"
    assert installation.run("box", "cat /home/user/after-restart") == "here\n"
    installation.run("box", "! cmp -s /proc/sys/kernel/random/boot_id /home/user/boot")


def test_a_guest_that_does_not_shut_down_is_cut_off_and_said_so(installation: LocalInstallation) -> None:
    # The agent stands still, so nobody in the guest hears of it; nor is this call answered before the machine is gone.
    script = "sync; pkill -STOP -f '[/]opt/shared/agent/start'; echo it stands still >/dev/ttyS0; sleep 600"
    body = {"command": ["sh", "-c", script], "user": "root"}
    with installation.manager.client() as client, ThreadPoolExecutor(1) as pool:
        ran = pool.submit(client.post, "/api/v1/sandboxes/box/run", json=body, timeout=120)
        wait_until(lambda: "it stands still" in client.get("/api/v1/sandboxes/box/console").text)
        stopped = installation.call("POST", "/sandboxes/box/stop?wait=true", {"grace_seconds": 3})
        assert (stopped["state"], stopped["stop_reason"]) == ("stopped", "forced")
        assert ran.result().status_code != 200
    installation.call("POST", "/sandboxes/box/start?wait=true")
    assert installation.run("box", "cat /home/user/after-restart") == "here\n"


def test_a_killed_manager_leaves_guests_at_work(installation: LocalInstallation) -> None:
    row = installation.call("GET", "/sandboxes/box")
    pids = vmm_pids(row["id"])
    installation.run("box", "nohup sleep 98765 >/dev/null 2>&1 & echo mine >/home/user/mine")
    installation.kill()
    installation.start()
    assert installation.call("GET", "/sandboxes/box")["state"] == "running"
    assert installation.run("box", "cat /home/user/mine; pgrep -c sleep") == "mine\n1\n"
    assert vmm_pids(row["id"]) == pids, "no sandbox was restarted"


def test_a_manager_that_ends_in_order_names_what_goes_on(installation: LocalInstallation) -> None:
    row = installation.call("GET", "/sandboxes/box")
    pids = vmm_pids(row["id"])
    said = installation.end()
    assert "sandbox box goes on running" in said
    assert vmm_pids(row["id"]) == pids
    installation.start()
    assert installation.run("box", "pgrep -c sleep") == "1\n"


def test_fsynced_data_outlives_a_power_cut(installation: LocalInstallation) -> None:
    """A program writes checksummed records, each fsync-ed before it is told; the machine is killed under it."""
    script = r"""
import os, sys, zlib
log = os.open("/home/user/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
told = os.open("/dev/ttyS0", os.O_WRONLY)
for number in range(10**9):
    record = b"%d %s" % (number, os.urandom(200).hex().encode())
    os.write(log, b"%08x %s\n" % (zlib.crc32(record), record))
    os.fsync(log)
    os.write(told, b"durable %d\n" % number)
"""
    installation.run("box", f"cat >/home/user/writer.py <<'END'\n{script}\nEND")
    installation.run("box", "sudo chmod 666 /dev/ttyS0; nohup python3 /home/user/writer.py >/dev/null 2>&1 &")
    row = installation.call("GET", "/sandboxes/box")

    def last_told() -> int:
        with installation.manager.client() as client:
            text = client.get("/api/v1/sandboxes/box/console?limit_bytes=4096").text
        numbers = [line.split()[1] for line in text.splitlines()[:-1] if line.startswith("durable ")]
        return int(numbers[-1]) if numbers else 0

    wait_until(lambda: last_told() > 50)
    (pid,) = vmm_pids(row["id"])
    told_before = last_told()
    os.kill(pid, signal.SIGKILL)

    def has_failed() -> dict[str, Any] | None:
        found = installation.call("GET", "/sandboxes/box")
        return found if found["state"] == "failed" else None

    failed = wait_until(has_failed)
    assert failed["failure"]["code"] == "vmm_ended"
    assert "durable" in failed["console_tail"]
    told = max(told_before, last_told())

    started = installation.call("POST", "/sandboxes/box/start?wait=true")
    assert started["state"] == "running", started
    check = (
        "import zlib\nlines = open('/home/user/log', 'rb').read().split(b'\\n')[:-1]\n"
        "good = [line for line in lines if int(line[:8], 16) == zlib.crc32(line[9:])]\n"
        "numbers = [int(line.split()[1]) for line in good]\n"
        "assert numbers == list(range(len(numbers))), 'a hole'\n"
        "print(len(numbers) - 1)\n"
    )
    installation.run("box", f"cat >/home/user/check.py <<'END'\n{check}\nEND")
    on_disk = int(installation.run("box", "python3 /home/user/check.py"))
    assert on_disk >= told > 50


def test_after_a_reboot_of_the_host_the_running_run_and_the_stopped_do_not(installation: LocalInstallation) -> None:
    """As a reboot leaves things: no machine, no run directory, another boot id than the rows know."""
    installation.create("second")
    installation.call("POST", "/sandboxes/second/stop?wait=true")
    row = installation.call("GET", "/sandboxes/box")
    installation.run("box", "echo before-reboot >/home/user/reboot; sync")
    installation.kill()
    for pid in vmm_pids(row["id"]):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not vmm_pids(row["id"]))
    with sqlite3.connect(installation.folder / "data" / "atelier.db") as database:
        database.execute("UPDATE sandboxes SET vmm_boot_id = 'an earlier boot' WHERE vmm_boot_id IS NOT NULL")
    database.close()

    installation.start()
    wait_until(lambda: installation.call("GET", "/sandboxes/box")["state"] == "running" and vmm_pids(row["id"]))
    assert installation.run("box", "cat /home/user/reboot") == "before-reboot\n"
    assert installation.call("GET", "/sandboxes/second")["state"] == "stopped"


def test_without_a_manager_the_sandboxes_can_be_stopped(installation: LocalInstallation) -> None:
    row = installation.call("GET", "/sandboxes/box")
    installation.kill()
    ended = run_manager_to_its_end(installation, "--down", "stop")
    assert "stopped sandbox box" in ended
    assert vmm_pids(row["id"]) == []
    assert processes_naming(str(installation.folder)) == [], "the gateway has nothing left to serve"
    installation.start()
    assert installation.call("GET", "/sandboxes/box")["state"] == "stopped"
    installation.call("DELETE", "/sandboxes/box?wait=true", expected=204)


def run_manager_to_its_end(installation: LocalInstallation, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "atelier.manager", *options],
        env=installation.manager.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
