"""Saved machines of the QEMU driver: what those that go on from them may do, and what is left when somebody dies."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.real_machines import NO_QEMU, emulated, get_boot_files
from tests.saved_machines import (
    CLONE,
    INSTALLATION,
    OTHER,
    PARENT,
    PATIENCE_SECONDS,
    QemuStage,
    card_for,
    nothing,
    running,
)
from tests.vm.ordinary_user import as_ordinary_user
from tests.vm.test_full_disk import mounted

from atelier.drivers.vmm import qemu, qemu_baking, qemu_saving
from atelier.drivers.vmm.qemu import QemuVmm
from atelier.drivers.vmm.qemu_arguments import OpenMemory, process_name
from atelier.drivers.vmm.qemu_disks import open_disk
from atelier.drivers.vmm.qemu_launch import PROGRAM, FileLimits, QemuHost, launch
from atelier.drivers.vmm.qemu_migration import Progress, query_status
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.drivers.vmm.vmm_users import find_user_range
from atelier.host import processes
from atelier.host.command import run
from atelier.host.piped_file import PipedFile
from atelier.host.sealed_memory import sealed_copy
from atelier.model.errors import AtelierError, DiskFullError, VmmError
from atelier.model.machine import ROOT_DISK_SERIAL, MachineSpec, MemoryImage, MemoryStream, ProcessIdentity

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

BAKED = "baked"
_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def stage() -> Iterator[QemuStage]:
    with running(QemuStage) as made:
        yield made


@pytest.fixture(scope="module")
def image(stage: QemuStage) -> MemoryImage:
    """Of the stage's machine, over ``stage.frozen``."""
    made = MemoryImage(stage.folder / "image-memory", stage.folder / "image-state")

    async def bake() -> None:
        await stage.bake(await stage.saved("for-the-image"), _baking(stage), made)

    asyncio.run(bake())
    return made


def _baking(stage: QemuStage) -> MachineSpec:
    return replace(stage.parent, sandbox_id=BAKED, run_directory=stage.folder / "baking")


def _bakers() -> list[ProcessIdentity]:
    return processes.find_processes(PROGRAM, ["-name", process_name(INSTALLATION, f"bake-{BAKED}")])


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


# --- confinement ------------------------------------------------------------------------------------------------------


def _user_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Uid:")).split()[1])


def _assert_confined(pid: int) -> None:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    assert status["Seccomp"] == ["2"]
    assert status["NoNewPrivs"] == ["1"]
    assert int(status["CapEff"][0], 16) == 0
    assert "0" not in status["Uid"]


def _what_it_can_write(pid: int) -> set[str]:
    """Files, by their names, that this process can write to: by the descriptors that it has, or by opening them anew as
    the user that it runs as."""
    writable: set[str] = set()
    process = os.pidfd_open(pid)
    taken: dict[int, str] = {}
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = os.readlink(entry)
            except FileNotFoundError:
                continue  # it was closed meanwhile
            if not name.startswith("/") or name.startswith("/dev/"):
                continue
            # The very same open file, with the rights that it was opened with.
            descriptor = _libc.syscall(_PIDFD_GETFD, process, int(entry.name), 0)
            if descriptor < 0 and ctypes.get_errno() == errno.EBADF:
                continue
            assert descriptor >= 0, os.strerror(ctypes.get_errno())
            taken[descriptor] = name
    finally:
        os.close(process)
    for descriptor, name in taken.items():
        if _takes_a_byte(descriptor):
            writable.add(name)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        user = _user_of(pid)
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        found: list[str] = []
        for descriptor, name in taken.items():
            for flags in (os.O_RDWR, os.O_WRONLY):
                try:
                    again = os.open(f"/proc/self/fd/{descriptor}", flags)
                except OSError:
                    continue
                if _takes_a_byte(again):
                    found.append(name)
        os.write(write_end, json.dumps(found).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        writable.update(json.load(pipe))
    os.waitpid(child, 0)
    for descriptor in taken:
        os.close(descriptor)
    return writable


def _takes_a_byte(descriptor: int) -> bool:
    """Tried by writing a byte that is there already; where a write would append, by the rights alone."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & os.O_APPEND:
        return flags & os.O_ACCMODE != os.O_RDONLY
    try:
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:
            present = file.read(1)
    except OSError:
        present = b"\0"
    try:
        return os.pwrite(descriptor, present, 0) == 1
    except OSError:
        return False


as_root = pytest.mark.skipif(
    os.geteuid() != 0 or find_user_range() is None, reason="a user id for each machine takes root with many of them"
)


@as_root
async def test_a_restored_machine_writes_to_nothing_but_its_own_disk(stage: QemuStage, image: MemoryImage) -> None:
    before = [file.path.read_bytes() for file in stage.frozen], image.memory.read_bytes(), image.state.read_bytes()
    specs = [stage.restored(each, image) for each in (CLONE, OTHER)]
    try:
        for spec in specs:
            await stage.start(spec)
            identity = await stage.vmm.find_process(spec.sandbox_id, spec.run_directory)
            assert identity is not None
            _assert_confined(identity.pid)
            links = [os.readlink(entry) for entry in Path(f"/proc/{identity.pid}/fd").iterdir()]
            assert sum("memfd:atelier-memory" in link for link in links) >= 1
            assert not {str(image.memory), str(image.state)} & set(links)
            own = {str(spec.root.top.path), *(str(spec.run_directory / name) for name in ("console.log", "qemu.log"))}
            assert _what_it_can_write(identity.pid) == own
        for spec in specs:
            await stage.life(spec.sandbox_id)
    finally:
        for spec in specs:
            await stage.stop(spec.sandbox_id)
    after = [file.path.read_bytes() for file in stage.frozen], image.memory.read_bytes(), image.state.read_bytes()
    assert after == before


@as_root
async def test_a_baking_machine_writes_to_its_memory_file_only(
    stage: QemuStage, image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    load_state = qemu_baking.load_state

    async def look_and_load(control: QmpConnection, state: Path, *, with_memory: bool) -> None:
        (baker,) = _bakers()
        _assert_confined(baker.pid)
        seen.append(_what_it_can_write(baker.pid))
        await load_state(control, state, with_memory=with_memory)

    monkeypatch.setattr(qemu_baking, "load_state", look_and_load)
    made = MemoryImage(stage.folder / "looked-at-memory", stage.folder / "looked-at-state")
    await stage.bake(MemoryStream(stage.folder / "for-the-image"), _baking(stage), made)
    folder = _baking(stage).run_directory
    assert seen == [{f"{made.memory}.new", *(str(folder / name) for name in ("console.log", "qemu.log"))}]
    assert [(path.stat().st_uid, path.stat().st_mode & 0o777) for path in (made.memory, made.state)] == [(0, 0o400)] * 2
    assert _bakers() == []


async def test_sealed_memory_is_refused_to_a_machine_that_would_share_it(stage: QemuStage, image: MemoryImage) -> None:
    spec = stage.restored(CLONE, image)
    await stage.vmm.ensure_run_directory(CLONE, spec.run_directory)
    host = QemuHost(INSTALLATION, "tcg", 0, find_user_range())
    sealed = sealed_copy(image.memory)
    try:
        with contextlib.ExitStack() as files:
            async with card_for(spec) as descriptor:
                identity = await launch(
                    host,
                    CLONE,
                    spec,
                    disks=[open_disk(disk, files) for disk in (spec.root, spec.tools)],
                    limits=FileLimits(2**30, 2**30),
                    memory=OpenMemory(sealed, shared=True),
                    network_descriptor=descriptor,
                    boots=False,
                )
        async with asyncio.timeout(PATIENCE_SECONDS):
            await processes.wait_ended(identity)
    except AtelierError as error:
        assert "not permitted" in str(error)
    finally:
        os.close(sealed)
    assert "not permitted" in (spec.run_directory / "qemu.log").read_text()
    await stage.stop(CLONE)


def test_an_ordinary_user_saves_machines_too() -> None:
    with tempfile.TemporaryDirectory(prefix="atelier-boot-") as name:
        Path(name).chmod(0o755)
        found = asyncio.run(get_boot_files())
        copies = [shutil.copyfile(file, Path(name) / file.name) for file in (found.kernel, found.initramfs)]
        boot = replace(found, kernel=copies[0], initramfs=copies[1])

        def act() -> list[bool]:
            with running(lambda folder: QemuStage(folder, boot)) as stage:
                return asyncio.run(_save_and_bake(stage))

        # Its links: neither was open.
        assert as_ordinary_user(act) == [False, False]


async def _save_and_bake(stage: QemuStage) -> list[bool]:
    stream = await stage.saved("an-ordinary-users")
    made = MemoryImage(stage.folder / "memory", stage.folder / "state")
    await stage.bake(stream, _baking(stage), made)
    specs = [stage.restored(CLONE, stream), stage.restored(OTHER, made)]
    for spec in specs:
        await stage.start(spec)
    return [(await stage.life(spec.sandbox_id))[1] for spec in specs]


# --- who dies in the middle -------------------------------------------------------------------------------------------


def _in_a_manager_that_dies(act: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """``act`` in a process of its own, which is to end at once somewhere inside."""
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(act())
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "it did not come to where it should have died"


async def _die(*_: object, **__: object) -> None:
    os._exit(0)


@pytest.mark.parametrize("moment", ["stopped_to_begin", "before_stop", "at_stop", "afterwards"])
def test_a_machine_whose_manager_died_while_saving_it(stage: QemuStage, moment: str) -> None:
    run_directory, target = stage.parent.run_directory, stage.folder / f"died-{moment}"

    async def save() -> None:
        vmm = emulated(INSTALLATION, stage.folder)
        before = _die if moment == "before_stop" else nothing
        at = _die if moment == "at_stop" else None
        if moment == "stopped_to_begin":
            setattr(qemu_saving, "send_state", _die)  # noqa: B010
        await vmm.save(run_directory, target, before_stop=before, at_stop=at)
        await _die()

    async def next_manager() -> None:
        await stage.vmm.go_on(run_directory)
        await stage.life(PARENT)
        await stage.vmm.save(run_directory, target, afterwards=nothing)
        await stage.life(PARENT)
        assert _names(stage.folder) & {target.name, f"{target.name}.new"} == {target.name}

    _in_a_manager_that_dies(save)
    assert target.exists() == (moment == "afterwards")
    asyncio.run(next_manager())


@pytest.mark.parametrize("before", ["load_state", "_set_link"])
def test_a_machine_whose_manager_died_while_restoring_it_is_started_anew(
    stage: QemuStage, image: MemoryImage, before: str
) -> None:
    spec = stage.restored(CLONE, image)

    async def restore() -> None:
        setattr(qemu, before, _die)
        await stage.start(spec)

    async def next_manager() -> None:
        left = await stage.vmm.find_process(CLONE, spec.run_directory)
        assert left is not None
        await stage.start(spec)
        found = await stage.vmm.find_process(CLONE, spec.run_directory)
        assert found is not None
        assert found != left
        assert not processes.is_alive(left)
        assert not (await stage.life(CLONE))[1], "its link is down"
        await stage.stop(CLONE)

    _in_a_manager_that_dies(restore)
    asyncio.run(next_manager())


async def test_a_bake_asks_for_no_proof_of_kvm(
    stage: QemuStage, image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no kernel that KVM could be tried with, and may be the first thing that a manager does."""

    async def probe(*arguments: object, **options: object) -> None:
        raise AssertionError("KVM was tried")

    monkeypatch.setattr(qemu, "probe_kvm", probe)
    made = MemoryImage(stage.folder / "unproved-memory", stage.folder / "unproved-state")
    spec = _baking(stage)
    stamp = await stage.vmm.stamp(spec.boot, spec.network.kind)
    fresh = QemuVmm(INSTALLATION, cache_dir=stage.folder / "cache")
    await fresh.bake(MemoryStream(stage.folder / "for-the-image"), stamp, spec, made)
    assert made.memory.read_bytes() == image.memory.read_bytes()


@pytest.mark.parametrize("by", ["bake", "ensure_stopped"])
def test_what_a_manager_that_died_while_baking_left_is_ended(stage: QemuStage, image: MemoryImage, by: str) -> None:
    made = MemoryImage(stage.folder / f"{by}-memory", stage.folder / f"{by}-state")
    stream, spec = MemoryStream(stage.folder / "for-the-image"), _baking(stage)

    async def bake() -> None:
        setattr(qemu_baking, "send_state", _die)  # noqa: B010
        vmm = emulated(INSTALLATION, stage.folder)
        await vmm.bake(stream, await vmm.stamp(spec.boot, spec.network.kind), spec, made)

    async def next_manager() -> None:
        (left,) = _bakers()
        if by == "bake":
            await stage.bake(stream, spec, made)
        else:
            await stage.vmm.ensure_stopped(BAKED, spec.run_directory, None)
            await stage.vmm.ensure_run_directory_absent(spec.run_directory)
        assert not processes.is_alive(left)
        assert _bakers() == []

    _in_a_manager_that_dies(bake)
    assert not made.memory.exists()
    asyncio.run(next_manager())
    assert made.memory.exists() == made.state.exists() == (by == "bake")
    assert not spec.run_directory.exists()


async def test_a_baking_machine_that_dies(
    stage: QemuStage, image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_state = qemu_baking.send_state

    async def send_and_die(control: QmpConnection, descriptor: int, **words: bool) -> None:
        await send_state(control, descriptor, **words)
        (baker,) = _bakers()
        await processes.kill_and_wait(baker)

    monkeypatch.setattr(qemu_baking, "send_state", send_and_die)
    before = _names(stage.folder)
    made = MemoryImage(stage.folder / "never-memory", stage.folder / "never-state")
    with pytest.raises(VmmError) as failure:
        await stage.bake(MemoryStream(stage.folder / "for-the-image"), _baking(stage), made)
    assert failure.value.code == "bake_failed"
    assert _names(stage.folder) == before
    assert not _baking(stage).run_directory.exists()


# --- what is rare -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_file_system() -> Iterator[Path]:
    for folder in mounted("24m"):
        yield folder / "data"


async def test_a_full_disk_leaves_the_machine_running_and_no_file(
    stage: QemuStage, image: MemoryImage, small_file_system: Path
) -> None:
    with pytest.raises(DiskFullError):
        await stage.vmm.save(stage.parent.run_directory, small_file_system / "stream")
    await stage.life(PARENT)
    assert list(small_file_system.iterdir()) == []
    made = MemoryImage(small_file_system / "memory", small_file_system / "state")
    with pytest.raises(DiskFullError):
        await stage.bake(MemoryStream(stage.folder / "for-the-image"), _baking(stage), made)
    assert list(small_file_system.iterdir()) == []
    assert _bakers() == []


async def test_a_machine_is_saved_that_may_write_small_files_only(
    stage: QemuStage, image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 8 * 2**20
    monkeypatch.setattr(qemu, "file_size_limits", lambda *_, **__: (limit, limit))
    spec = stage.restored(CLONE, image)
    await stage.start(spec)
    saved = await stage.vmm.save(spec.run_directory, stage.folder / "of-a-limited-one", afterwards=nothing)
    assert saved.size_bytes > 2 * limit
    await stage.life(CLONE)
    await stage.stop(CLONE)


@pytest.mark.parametrize("too_late", ["it came to the end", "it took note of stores meanwhile"])
async def test_a_guest_that_was_not_quiet_in_time_is_stopped_and_sent_once_more(
    stage: QemuStage, monkeypatch: pytest.MonkeyPatch, too_late: str
) -> None:
    """As it may come on a busy host: QEMU came to the end of the memory between two looks at it. The other is what no
    QEMU is known to do, and would lose stores."""
    starts: list[str] = []
    send_state, query_progress = qemu_saving.send_state, qemu_saving.query_progress

    async def send_and_tell(control: QmpConnection, *arguments: Any, **words: Any) -> None:
        starts.append(await query_status(control))
        await send_state(control, *arguments, **words)

    async def with_one_more(control: QmpConnection) -> Progress:
        progress = await query_progress(control)
        return replace(progress, syncs=progress.syncs + 1)

    monkeypatch.setattr(qemu_saving, "send_state", send_and_tell)
    if too_late == "it came to the end":
        monkeypatch.setattr(PipedFile, "let_through", lambda stream, _: stream.go_on())
    else:
        monkeypatch.setattr(qemu_saving, "query_progress", with_one_more)
    quiesced: list[tuple[int, bool]] = []

    async def before_stop() -> None:
        # It runs, or this would never be answered.
        quiesced.append(await stage.life(PARENT))

    target = stage.folder / "at-once"
    await stage.vmm.save(stage.parent.run_directory, target, before_stop=before_stop, afterwards=nothing)
    assert len(quiesced) == 1
    assert starts == ["paused", "paused"]
    await stage.life(PARENT)
    assert _names(stage.folder) & {"at-once", "at-once.new"} == {"at-once"}


async def test_a_restored_guest_learns_of_its_larger_disk(stage: QemuStage, image: MemoryImage) -> None:
    spec = stage.restored(CLONE, image)
    await run(["qemu-img", "resize", "-q", str(spec.root.top.path), "48M"])
    await stage.start(spec)
    try:
        await stage.life(CLONE)
        assert (await stage.signs(CLONE))[-1][2] == str(16 * 2048)
        for _ in range(2):
            await stage.vmm.resize_disk(spec.run_directory, ROOT_DISK_SERIAL, 48)
        await stage.life(CLONE)
        assert (await stage.signs(CLONE))[-1][2] == str(48 * 2048)
    finally:
        await stage.stop(CLONE)
