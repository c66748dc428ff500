"""Stopping, starting, restarting, resizing and retrying on fakes: what each does, and what it refuses."""

from __future__ import annotations

import asyncio

import pytest
from tests.lifecycle.conftest import Host

from atelier.db.sagas import list_open_sagas_of
from atelier.db.sandboxes import SandboxRepository
from atelier.lifecycle.admission import Capacity, RoomPolicy
from atelier.lifecycle.composition import LifecycleLimits
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import (
    CapacityError,
    ConflictError,
    GuestUnreachableError,
    HostError,
    InvalidRequestError,
    NotFoundError,
)
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState, StopReason


async def settled(lifecycle: SandboxLifecycle, sandbox_id: str) -> Sandbox:
    row = await lifecycle.wait_settled(sandbox_id, 30)
    assert row is not None
    return row


async def stopped(lifecycle: SandboxLifecycle, sandbox_id: str) -> Sandbox:
    await lifecycle.stop(sandbox_id)
    return await settled(lifecycle, sandbox_id)


def secrets_of(host: Host, sandbox_id: str) -> object:
    with host.database.read() as connection:
        return SandboxRepository().get_secrets(connection, sandbox_id)


async def test_stop_and_start(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle, environment={"A": "1"})
    own = secrets_of(host, sandbox.id)
    host.calls.clear()
    row = await stopped(lifecycle, sandbox.id)
    assert (row.state, row.stop_reason, row.failure_code) == (SandboxState.STOPPED, StopReason.REQUESTED, "")
    assert host.held_by(sandbox.id) == {"slot", "volume"}
    # The guest first, while the channel stands; the machine before its sockets.
    order = ["shut_down", "ensure_stopped", "ensure_channel_absent", "ensure_run_directory_absent"]
    assert [call for call in host.calls if call in order] == order
    assert host.storage.volumes[sandbox.id]

    host.calls.clear()
    await lifecycle.start(sandbox.id)
    row = await settled(lifecycle, sandbox.id)
    assert (row.state, row.stop_reason, row.spec) == (SandboxState.RUNNING, None, sandbox.spec)
    assert "ensure_image" not in host.calls, "it boots its own disk, whatever its image is by now"
    assert "ensure_volume" not in host.calls
    assert secrets_of(host, sandbox.id) == own
    identity = host.guests.identity(sandbox.id)
    assert identity is not None
    assert (identity.hostname, identity.environment) == ("one", {"A": "1"})
    assert host.states() == ["creating", "running", "stopping", "stopped", "starting", "running"]


async def test_a_machine_that_is_stopped_on_purpose_is_nobodys_failure(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.hang("ensure_channel_absent")
    await lifecycle.stop(sandbox.id)
    await host.reach("ensure_channel_absent")
    assert host.vmm.running == []
    await asyncio.sleep(0.05)
    row = host.row(sandbox.id)
    assert row is not None
    assert row.state is SandboxState.STOPPING
    host.faults.release("ensure_channel_absent")
    assert (await settled(lifecycle, sandbox.id)).state is SandboxState.STOPPED
    assert "failed" not in host.states()


async def test_a_guest_that_does_not_end_is_cut_off(host: Host) -> None:
    host.limits = LifecycleLimits(stop_grace_seconds=0.05)
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.guests.ignores_shut_down = True
    row = await stopped(lifecycle, sandbox.id)
    assert (row.state, row.stop_reason) == (SandboxState.STOPPED, StopReason.FORCED)
    assert host.held_by(sandbox.id) == {"slot", "volume"}
    event = [each for each in host.events() if each.kind == "sandbox.state_changed"][-1]
    assert event.payload["stop_reason"] == "forced"


async def test_a_guest_that_cannot_be_asked_is_cut_off(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.faults.fail_next("shut_down", GuestUnreachableError("no answer"))
    assert (await stopped(lifecycle, sandbox.id)).stop_reason is StopReason.FORCED


async def test_twice_is_once_and_the_wrong_state_is_refused(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    with pytest.raises(ConflictError) as runs:
        await lifecycle.start(sandbox.id)
    assert runs.value.code == "invalid_state"
    host.hang("shut_down")
    first, second = await lifecycle.stop(sandbox.id), await lifecycle.stop(sandbox.id)
    assert first.state is second.state is SandboxState.STOPPING
    with host.database.read() as connection:
        assert len(list_open_sagas_of(connection, sandbox.id)) == 1
    host.faults.release("shut_down")
    await settled(lifecycle, sandbox.id)
    with pytest.raises(ConflictError) as stands:
        await lifecycle.stop(sandbox.id)
    assert stands.value.code == "invalid_state"
    assert "is stopped" in stands.value.message
    host.hang("wait_ready")
    assert (await lifecycle.start(sandbox.id)).state is SandboxState.STARTING
    assert (await lifecycle.start(sandbox.id)).state is SandboxState.STARTING
    with pytest.raises(ConflictError):
        await lifecycle.stop(sandbox.id)
    host.faults.release("wait_ready")
    assert (await settled(lifecycle, sandbox.id)).state is SandboxState.RUNNING
    assert host.states().count("stopping") == host.states().count("starting") == 1
    for method in (lifecycle.start, lifecycle.stop, lifecycle.retry):
        with pytest.raises(NotFoundError):
            await method("aaaaaaaaaaaa")


async def test_restart(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    machine = host.vmm._machines[sandbox.id].identity
    await lifecycle.stop(sandbox.id, then_start=True)
    row = await settled(lifecycle, sandbox.id)
    assert row.state is SandboxState.RUNNING
    assert host.vmm._machines[sandbox.id].identity != machine
    assert host.states()[-4:] == ["stopping", "stopped", "starting", "running"]
    # It is watched: its machine's end is noticed.
    host.vmm.end_machine(sandbox.id)
    for _ in range(1000):
        if (row := host.row(sandbox.id)) and row.state is SandboxState.FAILED:
            break
        await asyncio.sleep(0.005)
    assert row is not None
    assert row.failure_code == "vmm_ended"
    assert row.failure_hint.endswith(f"atelier start {sandbox.id}")


async def test_a_failed_sandbox_starts_again_with_its_disk_or_with_a_new_one(host: Host) -> None:
    lifecycle = host.lifecycle()
    died = await host.created(lifecycle)
    host.vmm.end_machine(died.id)
    for _ in range(1000):
        if (row := host.row(died.id)) and row.state is SandboxState.FAILED:
            break
        await asyncio.sleep(0.005)
    volume = host.storage.volumes[died.id]
    await lifecycle.start(died.id)
    assert (await settled(lifecycle, died.id)).state is SandboxState.RUNNING
    assert host.storage.volumes[died.id] is volume

    host.faults.fail_next("initialize", HostError("broken"))
    never = await host.created(lifecycle, "never")
    assert (never.state, never.holds_volume) == (SandboxState.FAILED, False)
    host.faults.fail_next("wait_ready", HostError("broken again"))
    await lifecycle.start(never.id)
    row = await settled(lifecycle, never.id)
    assert (row.state, row.holds_volume, row.failure_message) == (SandboxState.FAILED, False, "broken again")
    assert host.held_by(never.id) == set()
    await lifecycle.start(never.id)
    assert (await settled(lifecycle, never.id)).state is SandboxState.RUNNING


async def test_a_disk_that_is_gone_is_said_and_not_replaced(host: Host) -> None:
    """As after the restore of an older backup: an empty disk in its place would be a lie."""
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    await stopped(lifecycle, sandbox.id)
    del host.storage.volumes[sandbox.id]
    await lifecycle.start(sandbox.id)
    row = await settled(lifecycle, sandbox.id)
    assert (row.state, row.failure_code) == (SandboxState.FAILED, "volume_lost")
    assert host.storage.volumes == {}
    await lifecycle.destroy(sandbox.id)
    assert host.held() == []


async def test_a_failed_start_keeps_the_disk(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    await stopped(lifecycle, sandbox.id)
    host.faults.fail_next("initialize", HostError("broken"))
    await lifecycle.start(sandbox.id)
    row = await settled(lifecycle, sandbox.id)
    assert (row.state, row.failure_message) == (SandboxState.FAILED, "broken")
    assert host.held_by(sandbox.id) == {"slot", "volume"}
    assert row.console_tail


async def test_the_console_of_the_last_run_can_be_read_while_it_is_stopped(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.vmm.run_directories[host.run.vmm_directory(sandbox.id)] += b"last words"
    row = await stopped(lifecycle, sandbox.id)
    assert (await lifecycle.console(row, 1000)).endswith(b"last words")
    await lifecycle.destroy(sandbox.id)
    assert host.held() == []


async def test_resize(host: Host) -> None:
    lifecycle = host.lifecycle(room=RoomPolicy(fixed=Capacity(disk_mib=10_000)))
    sandbox = await host.created(lifecycle, disk_mib=4096)
    host.calls.clear()
    await lifecycle.resize(sandbox.id, 8192)
    row = await settled(lifecycle, sandbox.id)
    assert (row.state, row.spec.disk_mib, row.file_system_mib) == (SandboxState.RUNNING, 8192, 8192)
    assert [call for call in host.calls if call in ("resize_disk", "grow_volume", "start_process")] == [
        "resize_disk",
        "start_process",
    ]
    assert host.states()[-1] == "sandbox.resized"
    with pytest.raises(InvalidRequestError) as smaller:
        await lifecycle.resize(sandbox.id, 4096)
    assert smaller.value.code == "disk_cannot_shrink"
    with pytest.raises(CapacityError) as beyond:
        await lifecycle.resize(sandbox.id, 12_000)
    assert "3808 MiB asked for, 1808 MiB of 10000 MiB free" in beyond.value.message
    row = host.row(sandbox.id)
    assert row is not None
    assert row.spec.disk_mib == 8192, "what was refused was not promised"

    await stopped(lifecycle, sandbox.id)
    host.calls.clear()
    await lifecycle.resize(sandbox.id, 9000)
    row = await settled(lifecycle, sandbox.id)
    assert (row.state, row.spec.disk_mib, row.file_system_mib) == (SandboxState.STOPPED, 9000, 8192)
    assert [call for call in host.calls if call in ("resize_disk", "grow_volume", "start_process")] == ["grow_volume"]
    await lifecycle.start(sandbox.id)
    row = await settled(lifecycle, sandbox.id)
    assert (row.state, row.file_system_mib) == (SandboxState.RUNNING, 9000), "grown at the next start"
    host.calls.clear()
    await lifecycle.stop(sandbox.id, then_start=True)
    await settled(lifecycle, sandbox.id)
    assert "start_process" not in host.calls, "and only then"


async def test_one_thing_at_a_time(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.hang("resize_disk")
    await lifecycle.resize(sandbox.id, 8192)
    await host.reach("resize_disk")
    for attempt in (lifecycle.stop(sandbox.id), lifecycle.resize(sandbox.id, 9000)):
        with pytest.raises(ConflictError) as busy:
            await attempt
        assert busy.value.code == "sandbox_busy"
    host.faults.release("resize_disk")
    assert (await settled(lifecycle, sandbox.id)).spec.disk_mib == 8192


async def test_a_machine_that_dies_while_its_disk_grows(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.hang("resize_disk")
    await lifecycle.resize(sandbox.id, 8192)
    await host.reach("resize_disk")
    host.vmm.end_machine(sandbox.id)
    for _ in range(1000):
        if (row := host.row(sandbox.id)) and row.state is SandboxState.FAILED:
            break
        await asyncio.sleep(0.005)
    host.faults.fail_next("resize_disk", HostError("no machine"))
    host.faults.release("resize_disk")
    for _ in range(1000):
        with host.database.read() as connection:
            if not list_open_sagas_of(connection, sandbox.id):
                break
        await asyncio.sleep(0.005)
    assert host.calls.count("grow_volume") == 1, "with no machine left the file itself is grown"
    await lifecycle.start(sandbox.id)
    row = await settled(lifecycle, sandbox.id)
    assert (row.state, row.file_system_mib) == (SandboxState.RUNNING, 8192)


async def test_starting_wants_room_as_creating_does(host: Host) -> None:
    lifecycle = host.lifecycle(room=RoomPolicy(fixed=Capacity(memory_mib=1024)))
    first, second = await host.created(lifecycle), await host.created(lifecycle, "two")
    await stopped(lifecycle, first.id)
    third = await host.created(lifecycle, "three")
    with pytest.raises(CapacityError) as short:
        await lifecycle.start(first.id)
    assert "512 MiB asked for, 0 MiB of 1024 MiB free, 512 MiB short" in short.value.message
    row = host.row(first.id)
    assert row is not None
    assert row.state is SandboxState.STOPPED
    await stopped(lifecycle, third.id)
    # N at once never overshoot.
    starts = await asyncio.gather(lifecycle.start(first.id), lifecycle.start(third.id), return_exceptions=True)
    assert sum(isinstance(each, CapacityError) for each in starts) == 1
    for each in (first, second, third):
        await lifecycle.wait_settled(each.id, 30)
    assert len(host.vmm.running) == 2


async def test_stop_all_leaves_what_is_stopped_alone(host: Host) -> None:
    lifecycle = host.lifecycle()
    names = [f"n{number}" for number in range(5)]
    made = [await lifecycle.start_create(name, SandboxSpec()) for name in names]
    await settled(lifecycle, made[0].id)
    await stopped(lifecycle, made[0].id)
    fleet = host.fleet(lifecycle)
    assert await fleet.stop_all() == names[1:]
    assert host.vmm.running == []
    assert fleet.list_running_names() == []
    assert len(host.storage.volumes) == 5


async def test_draining_waits_for_what_is_under_way(host: Host) -> None:
    lifecycle = host.lifecycle()
    fleet = host.fleet(lifecycle)
    host.hang("initialize")
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await host.reach("initialize")
    await fleet.drain(0.05)
    row = host.row(sandbox.id)
    assert row is not None
    assert row.state is SandboxState.CREATING
    draining = asyncio.create_task(fleet.drain(30))
    await asyncio.sleep(0.02)
    assert not draining.done()
    host.faults.release("initialize")
    await draining
    assert fleet.list_running_names() == ["one"]


async def test_what_a_manager_left_of_a_memory_goes_with_the_sandbox(host: Host) -> None:
    """It was killed while that was written."""
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    unfinished = host.data.saved_memory(sandbox.id)
    unfinished = unfinished.with_name(f"{unfinished.name}.new")
    unfinished.parent.mkdir()
    unfinished.touch()
    await lifecycle.destroy(sandbox.id)
    assert host.held() == []
    assert list(host.data.paused.iterdir()) == []
