"""A real guest stands still for a snapshot and is told that it is somebody else, as after a restore: processes, file system,
card, keys, clock, the owner's hooks, and the guest agent itself, which must live through all of it."""

from __future__ import annotations

import asyncio
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import pytest_asyncio
from tests.real_guest import CALL_SECONDS, SANDBOX, RealGuest, real_guest
from tests.real_machines import NO_QEMU

from atelier.lifecycle.ssh_host_key import make_ssh_host_key
from atelier.model.errors import AtelierError, GuestError, GuestUnreachableError
from atelier.model.guest import GuestIdentity, ProcessOutput, ProcessSpec, ProcessStarted, TerminalSize
from atelier.model.machine import GuestAddress

pytestmark = [
    pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU),
    pytest.mark.asyncio(loop_scope="module"),
]

STILL_SECONDS = 2.0
TICK_SECONDS = 0.02
HOOKS = "/etc/atelier/on-restore.d"

COUNTER = f"""
import os, time
with open(f"/run/ticks-{{os.getpid()}}", "w") as ticks:
    number = 0
    while True:
        ticks.write(f"{{number}} {{time.monotonic()}}\\n")
        ticks.flush()
        number += 1
        time.sleep({TICK_SECONDS})
"""
"""It writes to memory: what stops it is not the disk."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest() -> AsyncIterator[RealGuest]:
    async with real_guest() as booted:
        await booted.driver.initialize(SANDBOX, identity_of("parent", restored=False))
        yield booted


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def moving(guest: RealGuest) -> AsyncIterator[None]:
    """A test that failed leaves no guest that stands still to the next one."""
    yield
    await guest.driver.thaw(SANDBOX)


def identity_of(name: str, *, restored: bool = True, token: str = "first token", shift_ns: int = 0) -> GuestIdentity:
    number = sum(name.encode()) % 200 + 2
    return GuestIdentity(
        hostname=name,
        machine_id=uuid.uuid5(uuid.NAMESPACE_DNS, name).hex,
        token=token,
        entropy=uuid.uuid4().bytes * 4,
        host_time_ns=time.time_ns() + shift_ns,
        environment={"WHOSE": name},
        network=GuestAddress(f"10.77.0.{number}", 16, "10.77.0.1", "10.77.0.1"),
        mac_address=f"02:00:00:00:00:{number:02x}",
        host_key=make_ssh_host_key(),
        generation=str(uuid.uuid4()),
        restored=restored,
    )


async def start(guest: RealGuest, *arguments: str, **options: object) -> int:
    spec = ProcessSpec(arguments, user="root", **options)  # type: ignore[arg-type]
    async with guest.driver.start_process(SANDBOX, spec) as events:
        started = await anext(events)
    assert isinstance(started, ProcessStarted)
    return started.pid


async def start_counter(guest: RealGuest) -> int:
    """Returns once it counts."""
    pid = await start(guest, "python3", "-c", COUNTER)
    await guest.run(f"until test -s /run/ticks-{pid}; do sleep 0.1; done; sleep 0.5")
    return pid


async def ticks(guest: RealGuest, pid: int) -> list[tuple[int, float]]:
    lines = (await guest.run(f"cat /run/ticks-{pid}")).splitlines()
    return [(int(number), float(moment)) for number, moment in (line.split() for line in lines[:-1])]


async def with_hooks(guest: RealGuest, hooks: dict[str, str]) -> None:
    await guest.run(f"rm -rf {HOOKS} && mkdir -p {HOOKS}")
    for name, script in hooks.items():
        path = f"{HOOKS}/{name}"
        await guest.run(f"cat >{path} <<'END'\n#!/bin/sh\n{script}\nEND\nchmod 755 {path}")


async def group_of(guest: RealGuest, who: Sequence[str]) -> str:
    spec = ProcessSpec(("cat", "/proc/self/cgroup"), user=who[0], terminal=TerminalSize(80, 24) if who[1:] else None)
    async with asyncio.timeout(CALL_SECONDS), guest.driver.start_process(SANDBOX, spec) as events:
        output = [event.data async for event in events if isinstance(event, ProcessOutput)]
    return b"".join(output).decode().strip()


async def test_all_that_is_started_is_in_the_group_that_can_be_frozen(guest: RealGuest) -> None:
    for who in (("root",), ("user",), ("user", "on a terminal")):
        assert await group_of(guest, who) == "0::/atelier"
    assert await guest.run("cat /proc/1/cgroup; (setsid sh -c 'sleep 0.2; cat /proc/self/cgroup' &) | cat") == (
        "0::/atelier\n0::/atelier\n"
    ), "PID 1, and an orphan of its"


async def test_processes_stand_still_the_disk_is_whole_and_the_agent_answers(guest: RealGuest) -> None:
    pid = await start_counter(guest)
    stray = await start(
        guest,
        "sh",
        "-c",
        "mkdir -p /sys/fs/cgroup/mine/inner /sys/fs/cgroup/kept && echo 1 >/sys/fs/cgroup/kept/cgroup.freeze && "
        "echo $$ >/sys/fs/cgroup/mine/inner/cgroup.procs && exec sleep 1000",
    )
    rooted = await start(guest, "sh", "-c", "echo $$ >/sys/fs/cgroup/cgroup.procs && exec sleep 1000")
    await asyncio.sleep(1)
    content = uuid.uuid4().hex
    await guest.run(f"echo {content} >/home/user/just-before")
    await guest.driver.quiesce(SANDBOX)
    began = time.monotonic()
    late = asyncio.create_task(guest.run("echo late"))
    await asyncio.sleep(STILL_SECONDS)
    await guest.driver.wait_ready(SANDBOX, CALL_SECONDS)
    assert (await guest.driver.metrics(SANDBOX)).cpu_count == 1
    assert not late.done()
    copy = guest.folder / "copy.img"
    subprocess.run(
        ["qemu-img", "convert", "-U", "-O", "raw", str(guest.root.path), str(copy)], check=True, capture_output=True
    )
    stood_still = time.monotonic() - began
    await guest.driver.thaw(SANDBOX)
    assert await late == "late\n"
    head = subprocess.run(["dumpe2fs", "-h", str(copy)], check=True, capture_output=True, text=True).stdout
    features = next(line for line in head.splitlines() if line.startswith("Filesystem features:"))
    assert "has_journal" in features and "needs_recovery" not in features, "it was frozen, not only written back"
    read = subprocess.run(
        ["debugfs", "-R", "cat /home/user/just-before", str(copy)], check=True, capture_output=True, text=True
    )
    assert read.stdout.strip() == content
    copy.unlink()
    counted = await ticks(guest, pid)
    assert [number for number, _ in counted] == list(range(len(counted))), "it neither skips nor repeats"
    gaps = [after - before for (_, before), (_, after) in pairwise(counted)]
    assert max(gaps) >= stood_still * 0.9
    states = await guest.run(
        "cat /sys/fs/cgroup/atelier/cgroup.freeze /sys/fs/cgroup/mine/cgroup.freeze /sys/fs/cgroup/kept/cgroup.freeze; "
        f"cat /proc/{stray}/cgroup /proc/{rooted}/cgroup /proc/1/cgroup; test -e /run/atelier/quiesced || echo unmarked"
    )
    assert states.split() == ["0", "0", "1", "0::/mine/inner", "0::/atelier", "0::/atelier", "unmarked"]
    for each in (pid, stray, rooted):
        await guest.driver.send_signal(SANDBOX, each, 9)
    await guest.run(
        "echo 0 >/sys/fs/cgroup/kept/cgroup.freeze; sleep 0.2; cd /sys/fs/cgroup && rmdir mine/inner mine kept"
    )


async def test_it_becomes_somebody_else_before_its_processes_go_on(guest: RealGuest) -> None:
    await with_hooks(
        guest,
        {
            "20-second": f'echo "20 $(cat {HOOKS}/ran | wc -l)" >>{HOOKS}/ran',
            "10-first": f'echo "10 $(id -u) $ATELIER_GENERATION $ATELIER_HOSTNAME $WHOSE $(hostname)" >>{HOOKS}/ran',
        },
    )
    await guest.run(f"echo not executable >{HOOKS}/30-readme; touch {HOOKS}/ran")
    await guest.run("for kind in rsa ecdsa; do echo old >/etc/ssh/ssh_host_${kind}_key; done")
    pid = await start_counter(guest)
    # As far behind as a guest that was saved an hour ago.
    await guest.run("date -s '-1 hour'")
    await guest.driver.quiesce(SANDBOX)
    one = identity_of("fork-one")
    await guest.driver.initialize(SANDBOX, one)
    await asyncio.sleep(STILL_SECONDS)
    await guest.driver.thaw(SANDBOX)
    told = await guest.run(
        "hostname; cat /etc/hostname /etc/machine-id /run/atelier/generation /sys/class/net/eth0/address; "
        "grep -c fork-one /etc/hosts; date +%s; echo $WHOSE"
    )
    hostname, kept_name, machine_id, generation, mac, hosts, seconds, whose = told.split()
    assert hostname == kept_name == whose == "fork-one"
    assert (machine_id, generation, mac, hosts) == (one.machine_id, one.generation, one.mac_address, "1")
    assert abs(int(seconds) - time.time()) < 60
    assert one.network is not None and one.host_key is not None
    network = await guest.run("ip -4 addr show eth0; ip route; cat /etc/resolv.conf")
    assert f"inet {one.network.address}/16" in network
    assert "default via 10.77.0.1 dev eth0" in network
    keys = await guest.run(
        "cd /etc/ssh; stat -c '%n %a' ssh_host_*; cat ssh_host_ed25519_key.pub; ssh-keygen -yf ssh_host_ed25519_key"
    )
    assert keys.splitlines()[:2] == ["ssh_host_ed25519_key 600", "ssh_host_ed25519_key.pub 644"]
    assert [line.split()[:2] for line in keys.splitlines()[2:]] == [one.host_key.public_key.split()[:2]] * 2
    ran = (await guest.run(f"cat {HOOKS}/ran")).splitlines()
    assert ran == [f"10 0 {one.generation} fork-one fork-one fork-one", "20 1"]
    counted = await ticks(guest, pid)
    gaps = [after - before for (_, before), (_, after) in pairwise(counted)]
    assert max(gaps) >= STILL_SECONDS * 0.9, "nothing goes on before it is told to"
    await guest.driver.send_signal(SANDBOX, pid, 9)


async def test_the_same_one_keeps_its_key_and_its_time_goes_forward_only(guest: RealGuest) -> None:
    before = identity_of("resumed")
    await guest.driver.quiesce(SANDBOX)
    await guest.driver.initialize(SANDBOX, before)
    await guest.driver.thaw(SANDBOX)
    question = "cat /etc/ssh/ssh_host_ed25519_key.pub; ip -o link show eth0; date +%s.%N"
    key, _, seconds = (await guest.run(question)).splitlines()
    await guest.driver.quiesce(SANDBOX)
    again = replace(identity_of("resumed", shift_ns=-10 * 10**9), generation=before.generation)
    await guest.driver.initialize(SANDBOX, again)
    await guest.driver.thaw(SANDBOX)
    same_key, _, later = (await guest.run(question)).splitlines()
    assert same_key == key
    assert float(later) > float(seconds), "a clock that is a little ahead is slowed down, not put back"
    await guest.driver.initialize(SANDBOX, identity_of("resumed", restored=False))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo went wrong >&2; exit 3", "10-bad ended with exit status 3: went wrong"),
        ("kill -9 $$", "10-bad ended with signal 9"),
    ],
)
async def test_a_hook_that_fails_is_named_and_those_behind_it_are_not_run(
    guest: RealGuest, script: str, words: str
) -> None:
    await with_hooks(guest, {"10-bad": script, "20-behind": "touch /run/behind"})
    await guest.driver.quiesce(SANDBOX)
    with pytest.raises(GuestError) as caught:
        await guest.driver.initialize(SANDBOX, identity_of("hooked"))
    assert caught.value.code == "restore_hook_failed"
    assert words in caught.value.message
    assert caught.value.hint
    await guest.driver.thaw(SANDBOX)
    assert await guest.run("test -e /run/behind || echo not run") == "not run\n"
    await with_hooks(guest, {})


async def test_the_agent_is_killed_while_the_guest_stands_still(guest: RealGuest) -> None:
    await with_hooks(guest, {"10-kill": "test -e /run/killed || { touch /run/killed; kill -9 $PPID; sleep 100; }"})
    pid = await start_counter(guest)
    await guest.driver.quiesce(SANDBOX)
    with pytest.raises(GuestUnreachableError):
        await guest.driver.initialize(SANDBOX, identity_of("survivor"))
    await guest.driver.wait_ready(SANDBOX, CALL_SECONDS)
    late = asyncio.create_task(guest.run("hostname; cat /proc/1/cgroup /proc/self/cgroup"))
    await guest.driver.initialize(SANDBOX, identity_of("survivor"))
    await asyncio.sleep(STILL_SECONDS)
    assert not late.done(), "the new agent knows that it has to keep still"
    before = time.monotonic()
    await guest.driver.thaw(SANDBOX)
    assert await late == "survivor\n0::/atelier\n0::/atelier\n"
    await asyncio.sleep(1)
    counted = await ticks(guest, pid)
    assert [number for number, _ in counted] == list(range(len(counted)))
    assert len(counted) > 2 and time.monotonic() > before
    await guest.run(f"kill -9 {pid}")
    await with_hooks(guest, {})


async def test_the_tools_image_is_mounted_again(guest: RealGuest) -> None:
    gone = "umount -l /opt/shared; test -e /opt/shared/bin || echo gone"
    there = "grep ' /opt/shared ' /proc/mounts; ls /opt/shared/bin/atelier-init"
    for cover in ("true", "mount -t tmpfs over /opt/shared"):
        assert await guest.run(f"{gone}; {cover}") == "gone\n"
        await guest.driver.quiesce(SANDBOX)
        await guest.driver.initialize(SANDBOX, identity_of("equipped"))
        await guest.driver.thaw(SANDBOX)
        mounted = (await guest.run(there)).splitlines()
        assert "ext4 ro,noatime" in mounted[-2] and mounted[-1] == "/opt/shared/bin/atelier-init"


async def test_an_agent_that_died_without_its_tools_image_comes_back(guest: RealGuest) -> None:
    with pytest.raises(AtelierError):
        await guest.run("umount -l /opt/shared; kill -9 $PPID; sleep 100")
    await guest.driver.wait_ready(SANDBOX, CALL_SECONDS)
    assert await guest.run("ls /opt/shared/bin/atelier-init") == "/opt/shared/bin/atelier-init\n"


async def test_a_new_host_takes_over_and_what_the_old_one_had_asked_is_not_done(guest: RealGuest) -> None:
    driver = guest.driver
    shell = await start(guest, "sh", "-c", "echo scrollback; exec cat", terminal=TerminalSize(80, 24))

    async def follow() -> None:
        async with driver.connect_process(SANDBOX, shell) as events:
            async for _ in events:
                pass

    followed = asyncio.create_task(follow())
    await asyncio.sleep(1)
    await driver.quiesce(SANDBOX)
    asked = asyncio.create_task(driver.make_directory(SANDBOX, b"/root/of-the-old-host", "root"))
    await asyncio.sleep(STILL_SECONDS)
    await driver.ensure_channel_absent(SANDBOX)
    await driver.ensure_channel(SANDBOX, guest.endpoint, "token of the new host")
    await driver.wait_ready(SANDBOX, CALL_SECONDS)
    for of_before in (asked, followed):
        with pytest.raises(AtelierError):
            await of_before
    await driver.initialize(SANDBOX, identity_of("moved", token="token of the new host"))
    await driver.thaw(SANDBOX)
    assert await guest.run("test -e /root/of-the-old-host || echo never made") == "never made\n"
    seen = b""
    async with asyncio.timeout(CALL_SECONDS), driver.connect_process(SANDBOX, shell) as events:
        await driver.send_input(SANDBOX, shell, b"alive\r", terminal=True)
        async for event in events:
            if isinstance(event, ProcessOutput):
                seen += event.data
            if seen.count(b"alive") == 2:
                break
    assert seen.startswith(b"scrollback\r\n")
    await driver.send_signal(SANDBOX, shell, 9)


async def test_an_upload_is_held_back_and_one_of_the_old_host_s_is_dropped(guest: RealGuest) -> None:
    """The agent has one thread: had it written to the frozen disk, it would never answer again."""
    driver, piece, pieces = guest.driver, bytes(range(256)) * 256, 24
    go_on = asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        for number in range(pieces):
            yield piece
            if number == 2:
                await go_on.wait()

    kept = asyncio.create_task(driver.write_file(SANDBOX, b"/root/kept", content(), "root"))
    await asyncio.sleep(1)
    await driver.quiesce(SANDBOX)
    go_on.set()
    await asyncio.sleep(STILL_SECONDS)
    await driver.metrics(SANDBOX)
    assert not kept.done()
    await driver.thaw(SANDBOX)
    assert (await kept).size_bytes == pieces * len(piece)

    go_on.clear()
    dropped = asyncio.create_task(driver.write_file(SANDBOX, b"/root/dropped", content(), "root"))
    await asyncio.sleep(1)
    await driver.quiesce(SANDBOX)
    await driver.ensure_channel_absent(SANDBOX)
    go_on.set()
    with pytest.raises(AtelierError):
        await dropped
    await driver.ensure_channel(SANDBOX, guest.endpoint, guest.token)
    await driver.wait_ready(SANDBOX, CALL_SECONDS)
    await driver.initialize(SANDBOX, identity_of("dropper"))
    await driver.thaw(SANDBOX)
    assert await guest.run("ls -A /root | grep -c -e dropped -e atelier-upload || true") == "0\n"


async def test_a_guest_that_cannot_stand_still_says_so_and_goes_on(guest: RealGuest) -> None:
    """A process that waits inside of the kernel for the disk cannot be frozen."""
    pid = await start_counter(guest)
    await start(
        guest,
        "sh",
        "-c",
        "fsfreeze -f / && (echo written >/root/through-the-frost; touch /run/wrote) & sleep 1000",
    )
    await asyncio.sleep(STILL_SECONDS)
    with pytest.raises(GuestError) as caught:
        await guest.driver.quiesce(SANDBOX)
    assert caught.value.code == "quiesce_failed"
    assert "did not stand still" in caught.value.message
    assert (
        await guest.run("cat /sys/fs/cgroup/atelier/cgroup.freeze; cat /run/atelier/quiesced 2>&1 | wc -l") == "0\n1\n"
    )
    before = len(await ticks(guest, pid))
    await asyncio.sleep(1)
    assert len(await ticks(guest, pid)) > before
    assert await guest.run("cat /root/through-the-frost") == "written\n"
    await guest.driver.quiesce(SANDBOX)
    await guest.driver.thaw(SANDBOX)
    await guest.driver.send_signal(SANDBOX, pid, 9)
