"""What root does for jailed machines, and what it refuses whoever asks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atelier.host import processes
from atelier.host.jailer import jailer_arguments
from atelier.host.jails import JailHost, RootJails, root_host
from atelier.model.errors import ConflictError, HostError, NotFoundError
from atelier.model.ids import new_installation_id
from atelier.model.jail import (
    JailLink,
    JailPlaces,
    JailRequest,
    JailStart,
    jail_request_from_json,
    jail_start_from_json,
    machine_id,
    request_to_json,
)
from atelier.model.machine_limits import ProcessorAndMemoryLimits

INSTALLATION = new_installation_id()
NAME, OTHER = machine_id(INSTALLATION, "aaaaaaaaaaaa"), machine_id(INSTALLATION, "bbbbbbbbbbbb")
USER = 1_900_000_007 if os.geteuid() == 0 else os.geteuid()
LIMITS = ProcessorAndMemoryLimits(processors=2, memory_bytes=1 << 30, tasks=18)
FILE_BYTES = 1 << 31


@pytest.fixture
def jails(tmp_path: Path) -> RootJails:
    executable = tmp_path / "firecracker"
    executable.touch()
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "kernel").chmod(0o444)
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    python = Path(sys.executable).resolve()
    return RootJails(
        JailHost(
            INSTALLATION, JailPlaces(tmp_path / "jails", "firecracker"), executable,
            (str(python), "-c", "import time; time.sleep(1000)"), (python.name,), os.geteuid(), os.getegid(),
        )
    )  # fmt: skip


def _request(folder: Path) -> JailRequest:
    return JailRequest(
        NAME, USER, (JailLink(folder / "kernel", "kernel"),), folder / "disk.raw", ("metrics", "vmm.log")
    )


async def test_a_jail_is_built_and_goes(jails: RootJails, tmp_path: Path) -> None:
    request = _request(tmp_path)
    await jails.prepare_jail(request)
    await jails.prepare_jail(request)
    root = jails.places.file(NAME, "")
    assert root == tmp_path / "jails" / "firecracker" / NAME / "root"
    assert {path.name for path in root.iterdir()} == {"kernel", "disk", "metrics", "vmm.log"}
    for name in ("kernel", "disk"):
        assert (root / name).stat().st_nlink == 2, "linked, not copied"
    owners = {path.name: path.stat().st_uid for path in root.iterdir()}
    assert owners == {"kernel": os.geteuid(), "disk": USER, "metrics": USER, "vmm.log": USER}
    found = await jails.list_jails()
    assert [(jail.machine_id, jail.user_id, jail.process) for jail in found] == [(NAME, USER, None)]
    if os.geteuid() == 0:
        with pytest.raises(ConflictError) as refusal:
            await jails.prepare_jail(replace(request, machine_id=OTHER))
        assert refusal.value.code == "jail_user_taken"
    await jails.remove_jail(NAME)
    await jails.remove_jail(NAME)
    assert await jails.list_jails() == []
    disk = (tmp_path / "disk.raw").stat()
    assert (disk.st_uid, disk.st_nlink, stat.S_IMODE(disk.st_mode)) == (os.geteuid(), 1, 0o600)


async def test_the_managers_user_passes_to_what_it_is_granted_whatever_the_umask(
    jails: RootJails, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        await jails.prepare_jail(_request(tmp_path))
    finally:
        os.umask(before)
    jail = jails.places.jail(NAME)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (jail.parent, jail, jail / "root")] == [
        0o711,
        0o711,
        0o710,
    ]


async def test_what_nobody_is_granted(jails: RootJails, tmp_path: Path) -> None:
    request = _request(tmp_path)
    (tmp_path / "link").symlink_to("/etc/shadow")
    wrong = [
        replace(request, machine_id=machine_id("foreign", "aaaaaaaaaaaa")),
        replace(request, machine_id=f"at-{INSTALLATION}-../../etc"),
        replace(request, links=(JailLink(tmp_path / "kernel", "../kernel"),)),
        replace(request, links=(JailLink(tmp_path / "kernel", "dev"),)),
        replace(request, links=(JailLink(tmp_path / "link", "kernel"),)),
        replace(request, links=(JailLink(Path("/dev/null"), "kernel"),)),
        replace(request, links=(JailLink(tmp_path / ".." / "kernel", "kernel"),)),
        replace(request, empty_files=("/etc/passwd",)),
        replace(request, disk=Path("/dev/null")),
        replace(request, tap="eth0"),
    ]
    for each in wrong:
        with pytest.raises(HostError) as refusal:
            await jails.prepare_jail(each)
        assert refusal.value.code == "jail_refused", each
    with pytest.raises(NotFoundError) as missing:
        await jails.prepare_jail(replace(request, disk=tmp_path / "gone"))
    assert missing.value.code == "jail_file_missing"
    assert await jails.list_jails() == []
    for ask in (jails.kill, jails.grant, jails.flush_disk, jails.remove_jail):
        with pytest.raises(HostError) as refusal:
            await ask(machine_id("foreign", "aaaaaaaaaaaa"))
        assert refusal.value.code == "jail_refused"


async def test_only_what_a_vmm_wrote_is_taken_out(jails: RootJails, tmp_path: Path) -> None:
    await jails.prepare_jail(_request(tmp_path))
    await jails.add_files(NAME, ("saved-memory", "saved-state"))
    root = jails.places.file(NAME, "")
    (root / "saved-memory").write_bytes(b"memory")
    await jails.take_file(NAME, "saved-memory", tmp_path / "taken")
    taken = (tmp_path / "taken").stat()
    assert ((tmp_path / "taken").read_bytes(), taken.st_uid, stat.S_IMODE(taken.st_mode)) == (
        b"memory", os.geteuid(), 0o600,
    )  # fmt: skip
    assert not (root / "saved-memory").exists()

    async def refused(asked: Callable[[], Awaitable[None]]) -> str:
        with pytest.raises(HostError) as refusal:
            await asked()
        return refusal.value.code

    (root / "saved-state").unlink()
    (root / "saved-state").symlink_to("/etc/shadow")
    assert await refused(lambda: jails.take_file(NAME, "saved-state", tmp_path / "shadow")) == "jail_refused"
    (root / "saved-state").unlink()
    os.link(root / "disk", root / "saved-state")
    assert await refused(lambda: jails.take_file(NAME, "saved-state", tmp_path / "disk")) == "jail_refused"
    assert await refused(lambda: jails.take_file(NAME, "disk", tmp_path / "disk")) == "jail_refused"
    assert not (tmp_path / "shadow").exists()
    await jails.flush_disk(NAME)
    await jails.remove_jail(NAME)


async def test_a_machines_process_is_known_by_its_id_and_ended(jails: RootJails, tmp_path: Path) -> None:
    request = _request(tmp_path)
    await jails.prepare_jail(request)
    (tmp_path / "run").mkdir()
    start = JailStart(NAME, USER, tmp_path / "run" / "console", LIMITS, FILE_BYTES)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    for folder in ("none", "elsewhere"):
        with pytest.raises(HostError) as refusal:
            await jails.start(replace(start, console=tmp_path / folder / "console"))
        assert refusal.value.code == "jail_refused"
    identity = await jails.start(start)
    assert stat.S_IMODE((tmp_path / "run" / "console").stat().st_mode) == 0o600
    assert [jail.process for jail in await jails.list_jails()] == [identity]
    with pytest.raises(ConflictError) as conflict:
        await jails.prepare_jail(request)
    assert conflict.value.code == "jail_in_use"
    await jails.kill(OTHER)
    assert processes.is_alive(identity)
    await jails.kill(NAME)
    await jails.kill(NAME)
    assert not processes.is_alive(identity)
    await jails.remove_jail(NAME)


def test_the_jailers_words() -> None:
    """Source: Firecracker docs/jailer.md."""
    host = root_host(INSTALLATION, Path("/j"), Path("/o/firecracker"), Path("/o/jailer"), user_id=1, group_id=1)
    start = JailStart(NAME, 1234, Path("/r/console"), LIMITS, FILE_BYTES)
    assert host.places.file(NAME, "v.sock") == Path(f"/j/firecracker/{NAME}/root/v.sock")
    assert host.process_names == ("firecracker", "jailer")
    words = jailer_arguments(
        host.jailer, host.executable, host.places, start, with_cgroup=True, network_namespace=Path("/run/netns/n")
    )
    assert words == [
        "/o/jailer", "--id", NAME, "--exec-file", "/o/firecracker", "--uid", "1234", "--gid", "1234",
        "--chroot-base-dir", "/j", "--resource-limit", "fsize=2147483648", "--resource-limit", "no-file=256",
        "--cgroup-version", "2", "--parent-cgroup", "atelier-vm.slice", "--cgroup", "cpu.max=200000 100000",
        "--cgroup", "memory.max=1073741824", "--cgroup", "pids.max=18", "--netns", "/run/netns/n",
        "--", "--api-sock", "/api.sock", "--log-path", "/vmm.log", "--level", "Warning",
    ]  # fmt: skip
    plain = jailer_arguments(
        host.jailer, host.executable, host.places, start, with_cgroup=False, network_namespace=None
    )
    assert not {"--cgroup", "--parent-cgroup", "--netns"} & set(plain)


def test_requests_pass_as_json(tmp_path: Path) -> None:
    request = replace(_request(tmp_path), tap="attestaaaa", link_up=False)
    assert jail_request_from_json(request_to_json(request)) == request
    start = JailStart(NAME, USER, tmp_path / "console", LIMITS, FILE_BYTES)
    assert jail_start_from_json(request_to_json(start)) == start
    whole = request_to_json(request)
    for name, wrong in (
        ("user_id", "0"),
        ("user_id", True),
        ("disk", 3),
        ("links", [{"source": "/x"}]),
        ("tap", "a\0"),
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            jail_request_from_json({**whole, name: wrong})


_TAPS_IN_A_NAMESPACE = """
import contextlib, fcntl, os, struct
from atelier.host import tap
from atelier.host.jails import HostTaps
from atelier.host.netlink import RouteSocket

taps = HostTaps()
for name, user_id in (("attestaaaa", 1234), ("attestbbbb", 1235)):
    tap.create_persistent(name)
    taps.set_owner(name, user_id)
with contextlib.closing(RouteSocket()) as routes:
    index = routes.get_link("attestaaaa").index
    for up in (True, False, True):
        taps.set_link("attestaaaa", up=up)
        assert routes.get_link("attestaaaa").up is up, up
# The jailer gives each machine a node of its own.
nodes = [os.open("/dev/net/tun", os.O_RDWR) for _ in range(2)]
os.setgid(1234)
os.setuid(1234)
for node, name in zip(nodes, ("attestaaaa", "attestbbbb")):
    try:
        # TUNSETIFF, with what Firecracker asks for. Source: linux/if_tun.h.
        fcntl.ioctl(node, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002))
        print(name)
    except PermissionError as error:
        print(error.strerror)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="TAPs of a namespace of one's own take root")
def test_a_tap_becomes_a_machines_user_s() -> None:
    arguments = ["unshare", "--net", sys.executable, "-P", "-c", _TAPS_IN_A_NAMESPACE]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.splitlines() == ["attestaaaa", "Operation not permitted"], ended.stderr
