"""Templates on fakes: made of a sandbox of Atelier's own in the background, used by every later create, replaced in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.lifecycle.conftest import Host

from atelier.db.sandbox_networks import SandboxNetworkRepository
from atelier.db.sandboxes import SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.lifecycle.composition import LifecycleLimits
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.lifecycle.snapshot_files import SnapshotFiles
from atelier.model.errors import HostError
from atelier.model.machine import BootFiles, MachineStamp
from atelier.model.network_policy import CLOSED_POLICY
from atelier.model.sandbox import Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.snapshot import Snapshot, SnapshotPurpose, SnapshotState
from atelier.model.states import SandboxState


@pytest.fixture
async def lifecycle(host: Host) -> AsyncIterator[SandboxLifecycle]:
    yield begin(host)


def begin(host: Host) -> SandboxLifecycle:
    host.limits = LifecycleLimits(uses_templates=True)
    made = host.lifecycle()
    made.templates._idle_pause_seconds = 0.0
    return made


def templates(host: Host, *states: SnapshotState) -> list[Snapshot]:
    with host.database.read() as connection:
        return SnapshotRepository().list_in(connection, states, [SnapshotPurpose.TEMPLATE])


def own_sandboxes(host: Host) -> list[Sandbox]:
    with host.database.read() as connection:
        return [each for each in SandboxRepository().list_in(connection) if each.purpose is SandboxPurpose.TEMPLATE]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.005)


async def quiet(host: Host, lifecycle: SandboxLifecycle) -> None:
    """Until no template is being made."""
    await until(lambda: not lifecycle.templates._under_way and not own_sandboxes(host))


async def made(host: Host, lifecycle: SandboxLifecycle, **spec: Any) -> tuple[Sandbox, Snapshot]:
    """A sandbox that had to boot, and the template that was made for the next."""
    booted = await host.created(lifecycle, "first", **spec)
    assert booted.state is SandboxState.RUNNING, booted.failure_message
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)
    return booted, templates(host)[0]


def origin(host: Host, sandbox: Sandbox) -> str | None:
    """Path of the memory that its machine was restored from; None: it booted."""
    record = host.saga(sandbox.id)
    assert record is not None
    restore = record.outputs["image"].get("restore")
    return None if restore is None else str(restore)


def begins_from(host: Host, sandbox: Sandbox, template: Snapshot) -> bool:
    return template.id in (origin(host, sandbox) or "")


async def test_the_first_create_boots_and_the_next_is_restored(host: Host, lifecycle: SandboxLifecycle) -> None:
    first, template = await made(host, lifecycle)
    assert origin(host, first) is None
    assert template.sandbox_id != first.id, "never a user's sandbox"
    assert own_sandboxes(host) == []
    second = await host.created(lifecycle, "second")
    assert second.state is SandboxState.RUNNING, second.failure_message
    assert begins_from(host, second, template)
    assert second.snapshot_id is None, "a template is nothing that a user chose"
    identity = host.guests._guests[second.id].identity
    assert identity is not None
    assert identity.hostname == "second"
    assert host.vmm.is_link_open(second.id)
    await quiet(host, lifecycle)
    assert [each.id for each in templates(host)] == [template.id]
    for each in (first, second):
        await lifecycle.destroy(each.id)
    assert host.held() == []


async def test_the_sandbox_that_it_is_made_of_is_in_nobodys_list(host: Host, lifecycle: SandboxLifecycle) -> None:
    host.hang("save")
    first = await host.created(lifecycle, "first")
    await host.reach("save")
    (own,) = own_sandboxes(host)
    assert own.id != first.id
    with host.database.read() as connection:
        listed, _ = SandboxRepository().list_page(connection, 10)
        policy = SandboxNetworkRepository().get(connection, own.id).policy
    assert [each.id for each in listed] == [first.id]
    assert policy == CLOSED_POLICY
    host.faults.release("save")
    await quiet(host, lifecycle)
    assert len(templates(host, SnapshotState.READY)) == 1


async def test_many_first_creates_make_one(host: Host, lifecycle: SandboxLifecycle) -> None:
    begun = await asyncio.gather(*(host.begun(lifecycle, f"n{number}") for number in range(8)))
    for each in begun:
        await lifecycle.wait_settled(each.id, 20)
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)
    assert len(templates(host)) == 1


@pytest.mark.parametrize("spec", [{"vcpu_count": 2}, {"memory_mib": 1024}, {"image": "other"}])
async def test_another_kind_has_a_template_of_its_own(
    host: Host, lifecycle: SandboxLifecycle, spec: dict[str, Any]
) -> None:
    _, template = await made(host, lifecycle)
    other = await host.created(lifecycle, "other", **spec)
    assert origin(host, other) is None
    await until(lambda: len(templates(host, SnapshotState.READY)) == 2)
    await quiet(host, lifecycle)
    assert template.id in {each.id for each in templates(host)}, "it serves its own kind still"


async def test_a_larger_disk_is_restored_too_and_grows(host: Host, lifecycle: SandboxLifecycle) -> None:
    _, template = await made(host, lifecycle)
    large = await host.created(lifecycle, "large", disk_mib=8192)
    assert large.state is SandboxState.RUNNING, large.failure_message
    assert begins_from(host, large, template)
    assert large.file_system_mib == 8192


async def test_a_disk_that_is_smaller_than_a_templates_boots(host: Host, lifecycle: SandboxLifecycle) -> None:
    _, template = await made(host, lifecycle)
    small = await host.created(lifecycle, "small", disk_mib=2048)
    assert origin(host, small) is None
    await quiet(host, lifecycle)
    assert [each.id for each in templates(host)] == [template.id]


async def test_a_damaged_one_is_not_used_and_replaced(host: Host, lifecycle: SandboxLifecycle) -> None:
    _, template = await made(host, lifecycle)
    state = SnapshotFiles(host.data).image(template.id).state
    state.chmod(0o600)
    state.write_bytes(b"x" + state.read_bytes()[1:])
    second = await host.created(lifecycle, "second")
    assert second.state is SandboxState.RUNNING, second.failure_message
    assert origin(host, second) is None
    await until(lambda: [each.id for each in templates(host, SnapshotState.READY)] not in ([], [template.id]))
    await quiet(host, lifecycle)
    await until(lambda: len(templates(host)) == 1)
    third = await host.created(lifecycle, "third")
    assert begins_from(host, third, templates(host)[0])


@pytest.mark.parametrize("change", [{"vmm_version": "2.0.0"}, {"tsc_khz": 3_000_000}])
async def test_one_that_does_not_fit_is_not_used_and_replaced(
    host: Host, lifecycle: SandboxLifecycle, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    _, template = await made(host, lifecycle)
    was = host.vmm.stamp

    async def stamp(boot: BootFiles, network_kind: str) -> MachineStamp:
        return replace(await was(boot, network_kind), **change)

    monkeypatch.setattr(host.vmm, "stamp", stamp)
    second = await host.created(lifecycle, "second")
    assert second.state is SandboxState.RUNNING, second.failure_message
    assert origin(host, second) is None
    await until(lambda: template.id not in {each.id for each in templates(host)})
    await quiet(host, lifecycle)
    (newer,) = templates(host, SnapshotState.READY)
    assert begins_from(host, await host.created(lifecycle, "third"), newer)


async def test_a_new_image_has_a_new_one(host: Host, lifecycle: SandboxLifecycle) -> None:
    _, template = await made(host, lifecycle)
    host.images.build = "fedcba9876543210"
    second = await host.created(lifecycle, "second")
    assert origin(host, second) is None
    await until(lambda: template.id not in {each.id for each in templates(host)})
    await quiet(host, lifecycle)
    assert [each.image_id for each in templates(host)] == ["base-fedcba9876543210"]


async def test_a_failure_is_not_tried_again_at_once(host: Host, lifecycle: SandboxLifecycle) -> None:
    host.faults.fail_next("save", HostError("no", code="on_purpose"))
    await host.created(lifecycle, "first")
    await until(lambda: host.calls.count("save") == 1 and bool(lifecycle.templates._not_before))
    await quiet(host, lifecycle)
    assert templates(host) == []
    await host.created(lifecycle, "second")
    await quiet(host, lifecycle)
    await asyncio.sleep(0.1)
    assert host.calls.count("save") == 1
    lifecycle.templates._not_before.clear()  # as when the time has passed
    third = await host.created(lifecycle, "third")
    assert origin(host, third) is None
    await until(lambda: len(templates(host, SnapshotState.READY)) == 1)
    await quiet(host, lifecycle)


@pytest.mark.parametrize("operation", ["ensure_started", "metrics", "save"])
async def test_a_manager_that_ends_while_one_is_made_leaves_nothing(
    host: Host, lifecycle: SandboxLifecycle, operation: str
) -> None:
    first = await host.created(lifecycle, "first", vcpu_count=2)
    await until(lambda: bool(templates(host, SnapshotState.READY)))
    await quiet(host, lifecycle)
    host.hang(operation)
    lifecycle.templates.want(replace(first, spec=SandboxSpec()))
    await host.reach(operation)
    await lifecycle.close()
    assert own_sandboxes(host) != []
    host.faults.release(operation)
    after = begin(host)
    await after.recover()
    await until(lambda: own_sandboxes(host) == [])
    await until(lambda: all(each.state is SnapshotState.READY for each in templates(host)))
    await after.destroy(first.id)
    assert host.held() == []
