"""The freezer of the guest agent on real control groups, in namespaces of the test's own: a PID 1, an agent, and groups as
our init makes them and as systemd does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.real_machines import REPOSITORY, missing_programs

from atelier.guest_agent.freezer import Freezer

SCRIPT = """
import asyncio, os, subprocess, sys, time
from pathlib import Path
from atelier.guest_agent import freezer
freezer.SYSTEMD_MARK = sys.argv[2]
root = sys.argv[1]
frozen = freezer.Freezer(root)

def sleeper(group=None):
    process = subprocess.Popen(["sleep", "1000"])
    if group is not None:
        os.makedirs(root + group, exist_ok=True)
        Path(root + group, "cgroup.procs").write_text(str(process.pid))
    return process

def group_of(pid):
    return Path(f"/proc/{pid}/cgroup").read_text().split("0::")[1].split()[0]

def is_frozen(group):
    return "frozen 1" in Path(root + group, "cgroup.events").read_text()

def freeze(groups, seconds=10):
    async def run():
        async with asyncio.timeout(seconds):
            await frozen.freeze(groups)
    asyncio.run(run())
"""

OUR_INIT = """
frozen.unfreeze([])
frozen.unfreeze([])
assert group_of(1) == group_of(os.getpid()) == "/atelier", group_of(1)
child = sleeper()
assert group_of(child.pid) == "/atelier", "by descent alone"
nested, stray = sleeper("/atelier/inner"), sleeper("/")
apart, kept = sleeper("/own/deep"), sleeper("/kept")
Path(root, "kept/cgroup.freeze").write_text("1")
groups = []
freeze(groups)
assert sorted(groups) == ["/atelier", "/own"], groups
assert group_of(1) == group_of(os.getpid()) == "/", "PID 1 and the agent are out of it"
assert group_of(stray.pid) == "/atelier" and is_frozen("/atelier") and is_frozen("/own/deep")
freeze(groups)
assert sorted(groups) == ["/atelier", "/own"]
frozen.unfreeze(groups)
frozen.unfreeze(groups)
assert group_of(1) == group_of(os.getpid()) == "/atelier"
assert not is_frozen("/atelier") and not is_frozen("/own/deep") and is_frozen("/kept")
# An agent of before has written the group down, and died before it was frozen; another group is gone since.
groups = ["/atelier", "/gone"]
freeze(groups)
assert is_frozen("/atelier") and sorted(groups) == ["/atelier", "/gone", "/own"]
for process in (child, nested, stray, apart):
    process.kill()
    process.wait()
os.rmdir(root + "/own/deep")
os.rmdir(root + "/own")
frozen.unfreeze(groups)
assert group_of(os.getpid()) == "/atelier"
kept.kill()
"""

SYSTEMD = """
os.mkdir(sys.argv[2])
for group, pid in (("/init.scope", 1), ("/system.slice/agent.service", os.getpid())):
    os.makedirs(root + group)
    Path(root + group, "cgroup.procs").write_text(str(pid))
frozen.unfreeze([])
assert group_of(1) == "/init.scope", "its order is left alone"
child = sleeper()
assert group_of(child.pid) == "/system.slice/agent.service"
service, person = sleeper("/system.slice/sshd.service"), sleeper("/user.slice/user-1000.slice")
groups = []
freeze(groups)
assert sorted(groups) == ["/atelier", "/system.slice/sshd.service", "/user.slice"], groups
assert (group_of(1), group_of(os.getpid())) == ("/init.scope", "/system.slice/agent.service")
assert group_of(child.pid) == "/atelier" and all(map(is_frozen, groups))
frozen.unfreeze(groups)
assert not any(map(is_frozen, groups))
assert (group_of(1), group_of(os.getpid())) == ("/init.scope", "/system.slice/agent.service")
for process in (child, service, person):
    process.kill()
"""

FORKING = """
frozen.unfreeze([])
bomb = subprocess.Popen(["sh", "-c", "while :; do sleep 0.001 & wait; done"])
busy = subprocess.Popen(["sh", "-c", "echo $$ >$0/cgroup.procs; while :; do sleep 0.001 & wait; done", root])
time.sleep(0.5)
groups = []
freeze(groups)
def pids():
    return {name for name in os.listdir("/proc") if name.isdigit()}
before = pids()
time.sleep(0.5)
assert pids() == before, "nobody starts anything"
frozen.unfreeze(groups)
time.sleep(0.5)
assert pids() != before
bomb.kill()
busy.kill()
"""


def no_groups() -> str:
    if missing := missing_programs("unshare", "mount"):
        return missing
    if os.getuid() != 0:
        return "control groups of its own need root"
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs t /mnt && mkdir /mnt/c && mount -t cgroup2 c /mnt/c"]
    return "" if subprocess.run(probe, capture_output=True, check=False).returncode == 0 else "no cgroup v2 here"


NO_GROUPS = no_groups()

ENTER = """
set -e
mount -t tmpfs t "$1"
mkdir "$1/all" "$1/own"
mount -t cgroup2 c "$1/all"
group="$1/all/atelier-test-$$"
mkdir "$group"
echo $$ >"$group/cgroup.procs"
status=0
unshare --cgroup --pid --fork --mount --mount-proc sh -c 'mount -t cgroup2 c "$0/own" && "$@"; exit $?' "$@" || status=$?
echo $$ >"$1/all/cgroup.procs"
tries=0
until find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || [ $tries -gt 50 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
exit $status
"""
"""$1: a folder to mount at; the rest: what runs as a child of the new PID 1, a shell, whose end ends all others."""


@pytest.mark.skipif(bool(NO_GROUPS), reason=NO_GROUPS)
@pytest.mark.parametrize("story", [OUR_INIT, SYSTEMD, FORKING], ids=["our init", "systemd", "forking"])
def test_all_but_pid_1_and_the_agent_stand_still(story: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", ENTER, "sh", str(tmp_path)),
            *(sys.executable, "-c", SCRIPT + story, str(tmp_path / "own"), str(tmp_path / "own-systemd")),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


async def test_without_groups_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cgroup v2 is not mounted"):
        await Freezer(str(tmp_path)).freeze([])
