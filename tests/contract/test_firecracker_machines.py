"""What the Firecracker driver asks for, in which order, and what it does when it is refused. Over the fake Firecracker,
which checks every request and every answer against the vendor's document.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.fake_firecracker.document import NO_DOCUMENT
from tests.fake_firecracker.vsock import ECHO_PORT
from tests.firecracker_machines import DISK_MIB, MEMORY_MIB, FirecrackerStand, tapped

from atelier.drivers.vmm.firecracker_api import FirecrackerApi
from atelier.drivers.vmm.firecracker_config import RateLimiter, TokenBucket, Vm, rate_limiter
from atelier.drivers.vmm.firecracker_launch import MachineChoices, jail_request, jail_start
from atelier.gateway.vsock import connect_to_port
from atelier.host import processes
from atelier.model.errors import DiskFullError, MissingProgramError, VmmError
from atelier.model.ids import new_installation_id
from atelier.model.jail import machine_id
from atelier.model.machine import ROOT_DISK_SERIAL, DiskFile, MachineSpec, MemoryStream, NetworkAttachment

pytestmark = pytest.mark.skipif(bool(NO_DOCUMENT), reason=NO_DOCUMENT)

SANDBOX, CLONE = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
INSTALLATION = new_installation_id()
"""Of this run alone: another one beside it would end these machines as its own."""
TAP, OTHER_TAP = f"at{INSTALLATION}aaaa", f"at{INSTALLATION}bbbb"
BOOT = [
    "PUT /metrics",
    "PUT /machine-config",
    "PUT /boot-source",
    "PUT /drives/root",
    "PUT /drives/tools",
    "PUT /vsock",
    "PUT /entropy",
    "PUT /balloon",
    "PUT /network-interfaces/eth0",
    "PUT /actions",
]
PATIENCE_SECONDS = 60


@pytest.fixture
async def folder() -> AsyncIterator[Path]:
    # Not pytest's folder: its path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="atelier-fire-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def stand(folder: Path) -> AsyncIterator[FirecrackerStand]:
    async with _standing(FirecrackerStand(folder, INSTALLATION)) as stand:
        yield stand


@asynccontextmanager
async def _standing(stand: FirecrackerStand) -> AsyncIterator[FirecrackerStand]:
    try:
        yield stand
    finally:
        await _end(stand)
    assert stand.breaches() == []


async def _end(stand: FirecrackerStand) -> None:
    for sandbox_id in (SANDBOX, CLONE):
        await stand.vmm.ensure_stopped(sandbox_id, stand.folder / sandbox_id, None)


async def _assert_nothing_left(stand: FirecrackerStand, spec: MachineSpec) -> None:
    assert await stand.vmm.find_process(spec.sandbox_id, spec.run_directory) is None
    assert await stand.jails.list_jails() == []
    disk = spec.root.top.path.stat()
    assert (disk.st_uid, stat.S_IMODE(disk.st_mode), disk.st_nlink) == (os.geteuid(), 0o600, 1)


async def test_a_machine_is_asked_for_in_order_and_lives_in_its_jail(stand: FirecrackerStand) -> None:
    spec = await stand.started(tapped(stand.spec(SANDBOX), TAP))
    requests = dict(stand.requests())
    assert [name for name, _ in stand.requests()] == BOOT
    assert requests["PUT /machine-config"] == {
        "vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "smt": False, "track_dirty_pages": False,
    }  # fmt: skip
    assert requests["PUT /drives/root"] == {
        "drive_id": "root", "path_on_host": "/disk", "is_root_device": True, "is_read_only": False,
        "cache_type": "Writeback",
    }  # fmt: skip
    assert requests["PUT /drives/tools"]["is_read_only"] is True
    assert requests["PUT /network-interfaces/eth0"] == {
        "iface_id": "eth0", "host_dev_name": TAP, "guest_mac": "02:00:00:00:00:01",
    }  # fmt: skip
    assert "atelier.disks=in-order" in requests["PUT /boot-source"]["boot_args"].split()
    jail = (await stand.jails.list_jails())[0]
    assert jail.machine_id == machine_id(INSTALLATION, SANDBOX)
    assert jail.process == await stand.vmm.find_process(SANDBOX, spec.run_directory)
    root = stand.jails.places.file(jail.machine_id, "")
    # Every machine's jail has these names and no others: saved machines find their own by them.
    assert {path.name for path in root.iterdir()} == {
        "api.sock", "v.sock", "kernel", "initramfs", "disk", "tools", "vmm.log", "metrics",
        "firecracker", "dev", "run",
    }  # fmt: skip
    if os.geteuid() == 0:
        assert jail.user_id != 0
        assert stand.taps.owners == {TAP: jail.user_id}
        assert Path(f"/proc/{jail.process.pid}").stat().st_uid == jail.user_id
        assert stat.S_IMODE(root.stat().st_mode) == 0o710
    assert await stand.vmm.log_tail(spec.run_directory, 1000) == b"fake Firecracker\n"


async def test_rates_and_cpu_templates_are_handed_over(folder: Path) -> None:
    rate = rate_limiter(1_000_000)
    assert rate == RateLimiter(TokenBucket(1_000_000, 1000))
    assert rate_limiter(None) is None
    template = {"kvm_capabilities": ["!56"]}
    choices = MachineChoices(rate_limiter(5_000_000, 200), rate, "T2", template)
    async with _standing(FirecrackerStand(folder, INSTALLATION, choices=choices)) as stand:
        await stand.started(tapped(stand.spec(SANDBOX), TAP))
        requests = dict(stand.requests())
        assert requests["PUT /cpu-config"] == template
        assert requests["PUT /machine-config"]["cpu_template"] == "T2"
        assert requests["PUT /drives/root"]["rate_limiter"] == {
            "bandwidth": {"size": 5_000_000, "refill_time": 1000}, "ops": {"size": 200, "refill_time": 1000},
        }  # fmt: skip
        card = requests["PUT /network-interfaces/eth0"]
        assert (
            card["tx_rate_limiter"]
            == card["rx_rate_limiter"]
            == {"bandwidth": {"size": 1_000_000, "refill_time": 1000}}
        )


@pytest.mark.parametrize(("version", "keeps_clock"), [("1.12.0", False), ("1.16.1", True)])
async def test_a_saved_machine_goes_on_with_another_tap(folder: Path, version: str, keeps_clock: bool) -> None:
    async with _standing(FirecrackerStand(folder, INSTALLATION, version=version)) as stand:
        parent = await stand.started(tapped(stand.spec(SANDBOX), TAP))
        stand.forget_requests()
        frozen: list[Any] = []

        async def freeze() -> None:
            frozen.append(stand.requests())
            shutil.copyfile(parent.root.top.path, folder / "frozen")

        async def thaw() -> None:
            frozen.append(stand.requests())

        saved = await stand.vmm.save(parent.run_directory, folder / "saved", at_stop=freeze, afterwards=thaw)
        assert saved.vmm_version == version
        names = {"mem_file_path": "/saved-memory", "snapshot_path": "/saved-state", "snapshot_type": "Full"}
        stopped = [("PATCH /vm", {"state": "Paused"}), ("PUT /snapshot/create", names)]
        assert frozen == [stopped, [*stopped, ("PATCH /vm", {"state": "Resumed"})]]
        stand.forget_requests()
        clone = replace(
            tapped(stand.spec(CLONE), OTHER_TAP),
            root=stand.disk(CLONE, of=folder / "frozen"),
            restore_from=MemoryStream(folder / "saved"),
        )
        await stand.started(clone)
        load = {
            "snapshot_path": "/state",
            "mem_backend": {"backend_type": "File", "backend_path": "/memory"},
            "resume_vm": False,
            "network_overrides": [{"iface_id": "eth0", "host_dev_name": OTHER_TAP}],
        }
        if keeps_clock:
            load["clock_realtime"] = True
        none = {"size": 0, "refill_time": 0}
        assert stand.requests() == [
            ("PUT /metrics", {"metrics_path": "/metrics"}),
            ("PUT /snapshot/load", load),
            ("PATCH /drives/root", {"drive_id": "root", "rate_limiter": {"bandwidth": none, "ops": none}}),
            ("PATCH /vm", {"state": "Resumed"}),
        ]
        assert (stand.said / f"tap-{OTHER_TAP}").read_text() == "down"
        await stand.vmm.open_link(clone.run_directory)
        assert (stand.said / f"tap-{OTHER_TAP}").read_text() == "up"
        assert not (folder / "saved.state").exists()


async def test_a_restored_machine_has_the_rate_of_today(folder: Path) -> None:
    async with _standing(FirecrackerStand(folder, INSTALLATION)) as unlimited:
        spec = await unlimited.started(unlimited.spec(SANDBOX))
        await unlimited.vmm.save(spec.run_directory, folder / "saved")
    choices = MachineChoices(disk_rate=rate_limiter(None, 200))
    async with _standing(FirecrackerStand(folder, INSTALLATION, choices=choices)) as stand:
        await stand.started(replace(spec, restore_from=MemoryStream(folder / "saved")))
        told = dict(stand.requests())["PATCH /drives/root"]
        assert told["rate_limiter"] == {
            "bandwidth": {"size": 0, "refill_time": 0}, "ops": {"size": 200, "refill_time": 1000},
        }  # fmt: skip


async def test_another_versions_machine_does_not_go_on(folder: Path) -> None:
    async with _standing(FirecrackerStand(folder, INSTALLATION, version="1.15.0")) as older:
        spec = await older.started(older.spec(SANDBOX))
        before = await older.vmm.stamp(spec.boot, "none")
        await older.vmm.save(spec.run_directory, folder / "saved")
    async with _standing(FirecrackerStand(folder, INSTALLATION)) as newer:
        assert before.difference(await newer.vmm.stamp(spec.boot, "none")) == "vmm_version"
        spec = replace(spec, restore_from=MemoryStream(folder / "saved"))
        with pytest.raises(VmmError, match=r"version 1\.15\.0") as refusal:
            await newer.started(spec)
        assert refusal.value.code == "restore_failed"
        await _assert_nothing_left(newer, spec)


@pytest.mark.parametrize("request_name", BOOT)
async def test_whatever_is_refused_leaves_nothing(stand: FirecrackerStand, request_name: str) -> None:
    spec = tapped(stand.spec(SANDBOX), TAP)
    stand.misbehave(request_name, kind="answer", status=400, message="told to refuse")
    with pytest.raises(VmmError, match="told to refuse") as refusal:
        await stand.started(spec)
    assert refusal.value.code == "firecracker_refused"
    assert refusal.value.hint
    assert request_name in refusal.value.message
    await _assert_nothing_left(stand, spec)
    assert [name for name, _ in stand.requests()] == BOOT[: BOOT.index(request_name) + 1]
    if request_name == BOOT[-1]:
        stand.misbehave()
        await stand.started(spec)


@pytest.mark.parametrize(
    ("fault", "code", "hint"),
    [
        ({"kind": "answer", "status": 500, "message": "broken"}, "firecracker_failed", "log"),
        ({"kind": "answer", "status": 404, "message": "unknown"}, "firecracker_unknown_request", "newer"),
        (
            {"kind": "answer", "status": 400, "message": "Open tap device failed: Resource busy"},
            "firecracker_refused",
            "TAP",
        ),
        (
            {"kind": "answer", "status": 400, "message": "Error creating KVM object: /dev/kvm Permission denied"},
            "firecracker_refused",
            "/dev/kvm",
        ),
        ({"kind": "nonsense", "bytes": "SSH-2.0-OpenSSH_9.2\r\n"}, "firecracker_gone", "log"),
        (
            {"kind": "nonsense", "bytes": "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"},
            "firecracker_protocol",
            "listens",
        ),
        (
            {"kind": "nonsense", "bytes": f"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n{'x' * 3_000_000}"},
            "firecracker_protocol",
            "listens",
        ),
        ({"kind": "close"}, "firecracker_gone", "log"),
        ({"kind": "die"}, "firecracker_gone", "log"),
    ],
)
async def test_every_kind_of_wrong_answer(stand: FirecrackerStand, fault: dict[str, Any], code: str, hint: str) -> None:
    spec = stand.spec(SANDBOX)
    stand.misbehave("PUT /machine-config", **fault)
    with pytest.raises(VmmError) as refusal:
        await stand.started(spec)
    assert refusal.value.code == code, refusal.value
    assert hint in refusal.value.hint
    await _assert_nothing_left(stand, spec)


async def test_an_answer_that_does_not_come(stand: FirecrackerStand) -> None:
    spec = await stand.started(stand.spec(SANDBOX))
    stand.misbehave("PATCH /vm", kind="hang", seconds=2)
    socket = stand.jails.places.file(machine_id(INSTALLATION, SANDBOX), "api.sock")
    with pytest.raises(VmmError) as refusal:
        await FirecrackerApi(socket, timeout_seconds=0.2).patch(Vm("Paused"))
    assert refusal.value.code == "firecracker_timeout"
    stand.misbehave()
    await stand.vmm.go_on(spec.run_directory)
    # A link in the socket's place, as a VMM that was broken out of might leave, leads nowhere.
    moved = socket.with_name("moved")
    socket.rename(moved)
    socket.symlink_to(moved)
    with pytest.raises(VmmError) as refusal:
        await FirecrackerApi(socket).state()
    assert refusal.value.code == "firecracker_gone"


async def test_the_jailer_that_refuses_is_quoted(stand: FirecrackerStand) -> None:
    spec = stand.spec(SANDBOX)
    stand.misbehave("jailer", message="Failed to chroot: told to")
    with pytest.raises(VmmError, match="Failed to chroot: told to"):
        await stand.started(spec)
    await _assert_nothing_left(stand, spec)


@pytest.mark.parametrize("request_name", ["PUT /metrics", "PUT /snapshot/load", "PATCH /drives/root", "PATCH /vm"])
async def test_a_restore_that_is_refused_leaves_nothing(stand: FirecrackerStand, request_name: str) -> None:
    spec = await stand.started(stand.spec(SANDBOX))
    await stand.vmm.save(spec.run_directory, stand.folder / "saved")
    await _end(stand)
    spec = replace(spec, restore_from=MemoryStream(stand.folder / "saved"))
    stand.misbehave(request_name, kind="answer", status=400, message="told to refuse")
    with pytest.raises(VmmError, match="told to refuse") as refusal:
        await stand.started(spec)
    assert refusal.value.code == "restore_failed"
    await _assert_nothing_left(stand, spec)
    stand.misbehave()
    await stand.started(spec)


@pytest.mark.parametrize("request_name", ["PATCH /vm", "PUT /snapshot/create", "GET /version"])
async def test_a_save_that_is_refused_leaves_the_machine_running(stand: FirecrackerStand, request_name: str) -> None:
    spec = await stand.started(stand.spec(SANDBOX))
    stand.misbehave(request_name, kind="answer", status=400, message="told to refuse")
    with pytest.raises(VmmError, match="told to refuse"):
        await stand.vmm.save(spec.run_directory, stand.folder / "saved")
    stand.misbehave()
    socket = stand.jails.places.file(machine_id(INSTALLATION, SANDBOX), "api.sock")
    assert await FirecrackerApi(socket).state() == "Running"
    assert not list(stand.folder.glob("saved*"))
    root = stand.jails.places.file(machine_id(INSTALLATION, SANDBOX), "")
    assert not list(root.glob("saved*"))


async def test_a_full_disk_is_told_as_one(stand: FirecrackerStand) -> None:
    spec = await stand.started(stand.spec(SANDBOX))
    message = "Cannot write memory file: No space left on device (os error 28)"
    stand.misbehave("PUT /snapshot/create", kind="answer", status=400, message=message)
    with pytest.raises(DiskFullError):
        await stand.vmm.save(spec.run_directory, stand.folder / "saved")


async def test_what_a_dead_manager_had_begun_is_found_and_begun_anew(stand: FirecrackerStand) -> None:
    spec = await stand.started(stand.spec(SANDBOX))
    running = await stand.vmm.find_process(SANDBOX, spec.run_directory)
    (spec.run_directory / "vmm.json").unlink()
    assert await stand.vmm.find_process(SANDBOX, spec.run_directory) == running
    assert await stand.vmm.ensure_started(spec) == running, "it runs: nobody wrote down that it does"
    await _end(stand)
    # It was started, and its manager gave up.
    stand.forget_requests()
    stand.misbehave("PUT /metrics", kind="hang", seconds=1000)
    starting = asyncio.create_task(stand.started(spec))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not stand.requests():
            await asyncio.sleep(0.05)
    half = await stand.vmm.find_process(SANDBOX, spec.run_directory)
    assert half is not None
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await _assert_nothing_left(stand, spec)
    stand.misbehave("PUT /boot-source", kind="answer", status=400, message="x")
    with pytest.raises(VmmError):
        await stand.started(spec)
    stand.misbehave()
    again = await stand.vmm.ensure_started(spec)
    assert again not in (running, half)


async def test_a_process_that_never_came_to_run_is_begun_anew(stand: FirecrackerStand) -> None:
    spec = stand.spec(SANDBOX)
    await stand.started(spec)
    await _end(stand)
    name = machine_id(INSTALLATION, SANDBOX)
    user_id = 1_900_000_001 if os.geteuid() == 0 else os.geteuid()
    await stand.jails.prepare_jail(jail_request(spec, name, user_id))
    console = spec.run_directory / "console.log"
    half = await stand.jails.start(jail_start(spec, name, user_id, console))
    assert processes.is_alive(half)
    whole = await stand.vmm.ensure_started(spec)
    assert whole != half
    assert not processes.is_alive(half)


async def test_what_cannot_be_a_machine_is_refused_before_anything_is_made(stand: FirecrackerStand) -> None:
    spec = stand.spec(SANDBOX)
    no_elf = stand.folder / "bzImage"
    no_elf.write_bytes(b"MZ")
    refused = {
        "disk_not_raw": replace(spec, root=replace(spec.root, top=DiskFile(spec.root.top.path, "qcow2"))),
        "kernel_not_elf": replace(spec, boot=replace(spec.boot, kernel=no_elf)),
        "no_tap": replace(spec, network=NetworkAttachment("user_restricted")),
    }
    for code, wrong in refused.items():
        with pytest.raises(VmmError) as refusal:
            await stand.started(wrong)
        assert refusal.value.code == code
        assert refusal.value.hint
    await _assert_nothing_left(stand, spec)


async def test_which_firecracker_is_taken(stand: FirecrackerStand) -> None:
    assert str(await stand.vmm.prepare()) == "1.16.1"
    stand.executable.unlink()
    with pytest.raises(MissingProgramError, match="there is no Firecracker"):
        await stand.vmm.prepare()
    for said, code in (("1.11.9", "firecracker_too_old"), ("what", "firecracker_unusable")):
        stand.install(said)
        with pytest.raises(VmmError) as refusal:
            await stand.started(stand.spec(SANDBOX))
        assert refusal.value.code == code
    stand.executable.write_bytes(b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little"))
    with pytest.raises(VmmError, match="is for aarch64") as refusal:
        await stand.vmm.prepare()
    assert refusal.value.code == "firecracker_wrong_architecture"
    stand.install("1.12.0")
    assert str(await stand.vmm.prepare()) == "1.12.0"


async def test_a_disk_is_not_switched_and_grows(stand: FirecrackerStand) -> None:
    spec = await stand.started(stand.spec(SANDBOX))
    present, other = spec.root.top, stand.disk("other").top
    assert await stand.vmm.writes_to(spec.run_directory, ROOT_DISK_SERIAL, present)
    assert not await stand.vmm.writes_to(spec.run_directory, ROOT_DISK_SERIAL, other)
    async with stand.vmm.disk_switch(spec.run_directory, ROOT_DISK_SERIAL, present) as switch:
        await switch()
    with pytest.raises(VmmError) as refusal:
        async with stand.vmm.disk_switch(spec.run_directory, ROOT_DISK_SERIAL, other):
            pass
    assert refusal.value.code == "disk_cannot_switch"
    stand.forget_requests()
    await stand.vmm.resize_disk(spec.run_directory, ROOT_DISK_SERIAL, 2 * DISK_MIB)
    assert stand.requests() == [("PATCH /drives/root", {"drive_id": "root", "path_on_host": "/disk"})]
    assert present.path.stat().st_size == 2 * DISK_MIB * 1024 * 1024
    async with asyncio.timeout(PATIENCE_SECONDS):
        sectors = f"of {2 * DISK_MIB * 2048} ".encode()
        while sectors not in await stand.vmm.console_tail(spec.run_directory, 200):
            await asyncio.sleep(0.05)


async def test_metrics_and_the_balloon(stand: FirecrackerStand) -> None:
    spec = await stand.started(stand.spec(SANDBOX))
    for _ in range(2):
        assert (await stand.vmm.read_metrics(spec.run_directory))["utc_timestamp_ms"] == 1
    await stand.vmm.set_balloon(spec.run_directory, 8)
    assert stand.requests()[-1] == ("PATCH /balloon", {"amount_mib": 8})
    assert not await stand.vmm.resume_after_full_disk(spec.run_directory)


async def test_the_guest_is_reached_by_port_and_connections_end_with_a_snapshot(stand: FirecrackerStand) -> None:
    spec = await stand.started(stand.spec(SANDBOX))
    endpoint = stand.vmm.guest_endpoint(spec.run_directory)
    assert endpoint.kind == "vsock"
    loop = asyncio.get_running_loop()

    async def assert_echo() -> Any:
        connection = await connect_to_port(endpoint.socket_path, ECHO_PORT)
        await loop.sock_sendall(connection, b"hello")
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await loop.sock_recv(connection, 5) == b"hello"
        return connection

    connection = await assert_echo()
    with pytest.raises(ConnectionRefusedError):
        await connect_to_port(endpoint.socket_path, 4711)
    await stand.vmm.save(spec.run_directory, stand.folder / "saved")
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await loop.sock_recv(connection, 5) == b""
    connection.close()
    await stand.vmm.go_on(spec.run_directory)
    (await assert_echo()).close()
