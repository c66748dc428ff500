"""Templates that installations share, on fakes: one boots and makes it, the others adopt it, and nothing damaged is used."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lifecycle.conftest import Host
from tests.lifecycle.sabotage import Place, disturb, places
from tests.lifecycle.test_snapshot_sagas import find_sagas, kept
from tests.lifecycle.test_templates import begins_from, made, origin, own_sandboxes, quiet, templates, until

from atelier.lifecycle import shared_templates, snapshot_adopt, template_cache
from atelier.lifecycle.composition import LifecycleLimits
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.lifecycle.snapshot_files import MEMORY, STATE, SnapshotFiles
from atelier.lifecycle.template_cache import DISK, TemplateCache
from atelier.model.errors import HostError
from atelier.model.layout import CacheLayout
from atelier.model.machine import BootFiles, MachineStamp
from atelier.model.snapshot import Snapshot, SnapshotState
from atelier.model.states import SandboxState


class Installations:
    """Each with a data folder, drivers and a database of its own, over one cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = CacheLayout(folder / "cache")
        self.hosts: list[Host] = []

    def add(self) -> Host:
        folder = self.folder / f"host-{len(self.hosts)}"
        folder.mkdir()
        host = Host(folder)
        host.database.open()
        self.hosts.append(host)
        return host

    def begin(self, host: Host) -> SandboxLifecycle:
        host.limits = LifecycleLimits(uses_templates=True, template_cache=self.layout)
        lifecycle = host.lifecycle()
        lifecycle.templates._idle_pause_seconds = 0.0
        return lifecycle

    def entries(self) -> list[Path]:
        return [each for each in self.layout.templates.iterdir() if each.is_dir()]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Installations]:
    world = Installations(tmp_path)
    yield world
    for host in world.hosts:
        for lifecycle in host.lifecycles:
            await lifecycle.close()
        host.database.close()


async def filled(world: Installations) -> Path:
    """The cache's entry of a template that some installation has made."""
    host = world.add()
    await made(host, world.begin(host))
    (entry,) = world.entries()
    return entry


def spoil(path: Path) -> None:
    """Change one byte of this file, and of no other name of it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o400)


async def check_adopted(host: Host, lifecycle: SandboxLifecycle, name: str = "adopter") -> Snapshot:
    row = await host.created(lifecycle, name)
    assert row.state is SandboxState.RUNNING, row.failure_message
    (template,) = templates(host)
    assert template.state is SnapshotState.READY
    assert begins_from(host, row, template)
    return template


async def test_another_installation_never_boots(world: Installations) -> None:
    entry = await filled(world)
    host = world.add()
    lifecycle = world.begin(host)
    template = await check_adopted(host, lifecycle)
    assert (template.template_key, template.sandbox_name[:9]) == (entry.name, "template-")
    assert "save" not in host.calls, "no template was made here"
    assert template.machine.tools == host.folder / "tools", "its own, whatever becomes of the other's"
    second = await host.created(lifecycle, "second")
    assert begins_from(host, second, template)
    assert host.calls.count("import_snapshot_disk") == 1
    # The cache and the other installation may go.
    world.hosts[0].vmm.reboot()
    await lifecycle.destroy(second.id)
    await lifecycle.snapshots.delete(template.id)
    assert kept(host) == []
    assert entry.exists()


async def test_adopted_files_are_the_caches_own_where_there_can_be_links(world: Installations) -> None:
    entry = await filled(world)
    host = world.add()
    template = await check_adopted(host, world.begin(host))
    image = SnapshotFiles(host.data).image(template.id)
    for here, there in ((image.memory, entry / MEMORY), (image.state, entry / STATE)):
        assert here.samefile(there)
        assert not here.stat().st_mode & 0o222


@pytest.mark.parametrize("name", [MEMORY, STATE, DISK])
@pytest.mark.parametrize("how", ["one byte", "gone"])
async def test_a_damaged_one_is_removed_and_the_sandbox_boots(world: Installations, name: str, how: str) -> None:
    entry = await filled(world)
    if how == "gone":
        (entry / name).unlink()
    else:
        spoil(entry / name)
    host = world.add()
    lifecycle = world.begin(host)
    row = await host.created(lifecycle, "first")
    assert row.state is SandboxState.RUNNING, row.failure_message
    assert origin(host, row) is None
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)
    assert "save" in host.calls, "it has made one of its own"
    assert len(templates(host)) == 1
    assert len(kept(host)) == 2, "disk and folder of that one"
    (anew,) = world.entries()
    third = world.add()
    await check_adopted(third, world.begin(third))
    assert anew.name == entry.name


@pytest.mark.parametrize("words", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 99}', None])
async def test_one_without_a_proper_description_is_removed(world: Installations, words: bytes | None) -> None:
    entry = await filled(world)
    description = entry / "template.json"
    description.unlink()
    if words is not None:
        description.write_bytes(words)
    assert TemplateCache(world.layout).find(entry.name) is None
    assert not entry.exists()
    assert [each for each in world.layout.templates.iterdir() if each.is_dir()] == []


async def test_one_under_anothers_name_is_removed(world: Installations) -> None:
    entry = await filled(world)
    entry.rename(entry.with_name("0" * 32))
    assert TemplateCache(world.layout).find("0" * 32) is None
    assert world.entries() == []


@pytest.mark.parametrize("change", [{"vmm_version": "2.0.0"}, {"tsc_khz": 3_000_000}])
async def test_one_of_other_machines_is_not_adopted(
    world: Installations, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    await filled(world)
    host = world.add()
    was = host.vmm.stamp

    async def stamp(boot: BootFiles, network_kind: str) -> MachineStamp:
        return replace(await was(boot, network_kind), **change)

    monkeypatch.setattr(host.vmm, "stamp", stamp)
    lifecycle = world.begin(host)
    row = await host.created(lifecycle, "first")
    assert origin(host, row) is None
    assert "import_snapshot_disk" not in host.calls
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)


async def test_many_creates_at_once_adopt_one(world: Installations) -> None:
    await filled(world)
    host = world.add()
    lifecycle = world.begin(host)
    begun = await asyncio.gather(*(host.begun(lifecycle, f"n{number}") for number in range(8)))
    rows = [await lifecycle.wait_settled(each.id, 20) for each in begun]
    (template,) = templates(host)
    assert all(row is not None and begins_from(host, row, template) for row in rows)
    assert host.calls.count("import_snapshot_disk") == 1


async def test_many_installations_at_once_put_and_adopt_one(world: Installations) -> None:
    hosts = [world.add() for _ in range(4)]
    lifecycles = [world.begin(host) for host in hosts]
    pairs = list(zip(hosts, lifecycles, strict=True))
    await asyncio.gather(*(made(host, lifecycle) for host, lifecycle in pairs))
    assert len(world.entries()) == 1
    adopters = [world.add() for _ in range(4)]
    await asyncio.gather(*(check_adopted(host, world.begin(host)) for host in adopters))


async def test_a_create_does_not_wait_longer_than_for_a_boot(
    world: Installations, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(world)
    monkeypatch.setattr(shared_templates, "_PATIENCE_SECONDS", 0.05)
    host = world.add()
    host.hang("import_snapshot_disk")
    lifecycle = world.begin(host)
    row = await host.created(lifecycle, "first")
    assert row.state is SandboxState.RUNNING, row.failure_message
    assert origin(host, row) is None
    host.faults.release("import_snapshot_disk")
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)
    assert "save" not in host.calls, "none is made while one is adopted"
    assert begins_from(host, await host.created(lifecycle, "second"), templates(host)[0])


async def test_what_fails_otherwise_stays_and_is_not_tried_again_at_once(world: Installations) -> None:
    entry = await filled(world)
    host = world.add()
    host.faults.fail_next("import_snapshot_disk", HostError("no", code="on_purpose"))
    lifecycle = world.begin(host)
    row = await host.created(lifecycle, "first", disk_mib=1024 * 8)
    assert origin(host, row) is None
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)
    assert entry.exists()
    assert host.calls.count("import_snapshot_disk") == 1
    assert len(templates(host)) == 1


# --- crashes --------------------------------------------------------------------------------------------------------------


ADOPTING = places(find_sagas(snapshot_adopt.KIND), "do")


def test_there_are_places() -> None:
    assert {place.step for place in ADOPTING} == {"files", "disk", "checksums"}


@pytest.mark.parametrize("place", ADOPTING, ids=str)
async def test_an_error_at_any_place(world: Installations, place: Place) -> None:
    await filled(world)
    host = world.add()
    lifecycle = world.begin(host)
    errors = [HostError("broken on purpose", code="on_purpose")]

    async def fail(reached: Place) -> None:
        if reached == place and errors:
            raise errors.pop()

    disturb(lifecycle, fail)
    row = await host.created(lifecycle, "first")
    assert errors == []
    assert row.state is SandboxState.RUNNING, row.failure_message
    assert origin(host, row) is None
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)
    await lifecycle.destroy(row.id)
    for template in templates(host):
        await lifecycle.snapshots.delete(template.id)
    assert kept(host) == []
    assert host.held() == []


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("place", ADOPTING, ids=str)
async def test_a_manager_that_ends_at_any_place(world: Installations, place: Place, *, twice: bool) -> None:
    """The next one goes on with it. ``twice``: the entry is gone by then; it either has all, or nothing is left of it."""
    entry = await filled(world)
    host = world.add()
    lifecycle = world.begin(host)
    reached_it = asyncio.Event()

    async def hang(reached: Place) -> None:
        if reached == place:
            reached_it.set()
            await asyncio.Event().wait()

    disturb(lifecycle, hang)
    begun = await host.begun(lifecycle, "first")
    await asyncio.wait_for(reached_it.wait(), 30)
    await lifecycle.close()
    assert templates(host, SnapshotState.READY) == []
    if twice:
        TemplateCache(world.layout).remove(entry.name, "for the test")
    after = world.begin(host)
    await after.recover()
    row = await after.wait_settled(begun.id, 30)
    assert row is not None
    assert row.state is SandboxState.RUNNING, row.failure_message
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, after)
    second = await host.created(after, "second")
    assert origin(host, second) is not None
    for each in (row, second):
        await after.destroy(each.id)
    for template in templates(host):
        await after.snapshots.delete(template.id)
    assert kept(host) == []
    assert host.held() == []


async def test_a_put_that_is_cut_off_leaves_nothing_that_is_used(
    world: Installations, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = await filled(world)
    for name in (".building-abc", ".removed-def"):
        (world.layout.templates / name).mkdir()
        (world.layout.templates / name / MEMORY).write_bytes(b"half")
    host = world.add()
    lifecycle = world.begin(host)
    await host.created(lifecycle, "other", vcpu_count=2)
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)
    names = {each.name for each in world.layout.templates.iterdir()}
    assert len(names) == 3, names
    assert {entry.name, "lock"} < names


# --- what goes by itself --------------------------------------------------------------------------------------------------


def age(entry: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(entry, (then, then))


def copy_entry(entry: Path, key: str, **changes: Any) -> Path:
    """Another template like it."""
    copy = entry.with_name(key)
    copy.mkdir()
    for file in entry.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    words = json.loads((copy / "template.json").read_bytes())
    (copy / "template.json").write_text(json.dumps({**words, "key": key, **changes}))
    return copy


async def put_another(world: Installations, **spec: Any) -> None:
    host = world.add()
    lifecycle = world.begin(host)
    await host.created(lifecycle, "other", **spec)
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)
    assert own_sandboxes(host) == []


async def test_those_without_an_image_go_when_another_is_put(world: Installations) -> None:
    entry = await filled(world)
    copy_entry(entry, "1" * 32, image_id="base-ffffffffffffffff")
    await put_another(world, vcpu_count=2)
    assert entry in world.entries()
    assert len(world.entries()) == 2


async def test_superseded_ones_go_when_nobody_has_used_them_for_long(world: Installations) -> None:
    entry = await filled(world)
    fresh, old, others = (copy_entry(entry, digit * 32) for digit in "123")
    age(old, 2 * 24 * 3600)
    words = json.loads((others / "template.json").read_bytes())
    words["machine"]["stamp"]["network_kind"] = "tap"
    (others / "template.json").write_text(json.dumps(words))
    age(others, 2 * 24 * 3600)
    age(entry, 2 * 24 * 3600)
    await put_another(world, vcpu_count=2)
    assert {fresh, old, others, entry} < set(world.entries()), "of another kind than what was put"
    TemplateCache(world.layout).remove(entry.name, "for the test")
    await put_another(world)
    left = set(world.entries())
    assert old not in left
    assert {fresh, others, entry} < left, "just used, for another network, and the one that was put"


async def test_the_ones_used_last_are_kept(world: Installations) -> None:
    entry = await filled(world)
    copies = [copy_entry(entry, f"{number:032x}", vcpu_count=10 + number) for number in range(template_cache._MOST)]
    for number, each in enumerate(copies):
        age(each, 100.0 + number)
    age(copies[0], 10_000.0)
    TemplateCache(world.layout).note_use(copies[-1].name)
    await put_another(world, vcpu_count=2)
    left = world.entries()
    assert len(left) == template_cache._MOST
    assert copies[-1] in left
    assert copies[0] not in left
