"""Creating and destroying on fakes: the order, and a clean slate after every failure at every step."""

from __future__ import annotations

import asyncio

import pytest
from tests.lifecycle.conftest import Host

from atelier.lifecycle.admission import Capacity, RoomPolicy
from atelier.lifecycle.composition import LifecycleLimits
from atelier.model.errors import (
    CapacityError,
    ConflictError,
    DiskFullError,
    GuestUnreachableError,
    HostError,
    NotFoundError,
    TimeoutExceededError,
)
from atelier.model.sandbox import SandboxSpec
from atelier.model.states import SandboxState
from atelier.saga.log import SagaStatus

ACQUIRES = ["ensure_slot", "ensure_volume", "ensure_run_directory", "ensure_channel", "ensure_started"]
FREES = [
    "ensure_stopped",
    "ensure_channel_absent",
    "ensure_run_directory_absent",
    "ensure_volume_absent",
    "ensure_slot_absent",
]
STEPS = ["ensure_boot_files", "ensure_image", *ACQUIRES, "wait_ready", "initialize", "start_process"]


async def test_a_sandbox_is_created(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle, environment={"A": "1"})
    assert (sandbox.state, sandbox.name, sandbox.host_id) == (SandboxState.RUNNING, "one", "abcd")
    assert sandbox.spec.image_id == "base-0123456789abcdef"
    assert host.row(sandbox.id) == sandbox
    assert host.states() == ["creating", "running"]
    identity = host.guests.identity(sandbox.id)
    assert identity is not None
    assert (identity.hostname, identity.environment) == ("one", {"A": "1"})
    assert len(identity.entropy) >= 32
    assert len(identity.machine_id) == 32
    endpoint, token = host.guests.channels[sandbox.id]
    assert token == identity.token
    assert endpoint.socket_path.parent == host.run.vmm_directory(sandbox.id)
    assert [spec.arguments[:2] for spec in host.guests.processes] == [("sh", "-c")]


async def test_the_order_of_create_and_its_reverse_in_destroy(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    order = [call for call in host.calls if call in STEPS]
    assert order == STEPS
    host.calls.clear()
    await lifecycle.destroy(sandbox.id)
    assert [call for call in host.calls if call in FREES] == FREES
    assert [call.removesuffix("_absent") for call in FREES[1:]] == list(reversed(ACQUIRES[:-1]))
    assert host.held() == []
    assert host.row(sandbox.id) is None
    assert host.saga(sandbox.id) is None
    assert host.states() == ["creating", "running", "destroying", "sandbox.destroyed"]


async def test_progress_is_told_and_bounded(host: Host) -> None:
    sandbox = await host.created(host.lifecycle())
    progress = [event for event in host.events() if event.kind == "sandbox.progress"]
    assert [event.payload["phase"] for event in progress] == ["kernel", "image"]
    assert all(event.sandbox_id == sandbox.id for event in progress)


@pytest.mark.parametrize("operation", STEPS)
async def test_an_error_at_any_step_leaves_a_failed_row_and_nothing_else(host: Host, operation: str) -> None:
    lifecycle = host.lifecycle()
    host.faults.fail_next(operation, DiskFullError("no room", hint="make some"))
    sandbox = await host.created(lifecycle)
    assert sandbox.state is SandboxState.FAILED
    assert (sandbox.failure_code, sandbox.failure_message, sandbox.failure_hint) == (
        "disk_full",
        "no room",
        "make some",
    )
    assert host.held_without_consoles() == []
    assert host.states() == ["creating", "failed"]
    await lifecycle.destroy(sandbox.id)
    assert host.row(sandbox.id) is None
    assert host.held() == []
    assert (await host.created(lifecycle)).state is SandboxState.RUNNING  # the name is free again


@pytest.mark.parametrize("operation", STEPS)
async def test_a_defect_at_any_step_is_reported_as_one(host: Host, operation: str) -> None:
    host.faults.fail_next(operation, ZeroDivisionError("oops"))  # type: ignore[arg-type]
    sandbox = await host.created(host.lifecycle())
    assert (sandbox.state, sandbox.failure_code) == (SandboxState.FAILED, "internal")
    assert "ZeroDivisionError: oops" in sandbox.failure_message
    assert host.held_without_consoles() == []


@pytest.mark.parametrize("operation", [step for step in STEPS if step != "wait_ready"])
async def test_transient_errors_are_tried_again(host: Host, operation: str) -> None:
    host.faults.fail_next(operation, GuestUnreachableError("not now"), times=2)
    sandbox = await host.created(host.lifecycle())
    assert sandbox.state is SandboxState.RUNNING
    assert host.calls.count(operation) == 3


@pytest.mark.parametrize("operation", FREES)
@pytest.mark.parametrize("step", ["start_process", None])
async def test_an_undo_that_fails_for_a_while(host: Host, operation: str, step: str | None) -> None:
    lifecycle = host.lifecycle()
    host.faults.fail_next(operation, HostError("busy"), times=3)
    if step is not None:
        host.faults.fail_next(step, HostError("broken"))
    sandbox = await host.created(lifecycle)
    await lifecycle.destroy(sandbox.id)
    assert host.held() == []
    assert host.row(sandbox.id) is None


@pytest.mark.parametrize("operation", FREES)
async def test_a_destroy_that_is_stuck_says_so_and_can_be_asked_for_again(host: Host, operation: str) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.faults.fail_next(operation, HostError("held by somebody", hint="let go"), times=4)
    with pytest.raises(HostError) as stuck:
        await lifecycle.destroy(sandbox.id)
    assert stuck.value.code == "destroy_stuck"
    assert "held by somebody" in stuck.value.message
    row = await lifecycle.wait_settled(sandbox.id, 20)
    assert row is not None
    assert (row.state, row.failure_code) == (SandboxState.DESTROYING, "destroy_stuck")
    assert host.states()[-1] == "sandbox.stuck"
    assert host.held() != []

    await lifecycle.destroy(sandbox.id)
    assert host.held() == []
    assert host.row(sandbox.id) is None


@pytest.mark.parametrize("operation", FREES)
async def test_a_failed_creation_whose_cleaning_up_is_stuck(host: Host, operation: str) -> None:
    lifecycle = host.lifecycle()
    host.faults.fail_next("start_process", HostError("broken"))
    host.faults.fail_next(operation, HostError("held by somebody"), times=4)
    sandbox = await host.created(lifecycle)
    assert (sandbox.state, sandbox.failure_code) == (SandboxState.FAILED, "create_stuck")
    assert "broken" in sandbox.failure_message
    assert "held by somebody" in sandbox.failure_message
    await lifecycle.close()

    again = host.lifecycle()
    await again.recover()
    for _ in range(1000):
        record = host.saga(sandbox.id)
        if record is not None and record.status is SagaStatus.UNWOUND:
            break
        await asyncio.sleep(0.005)
    row = host.row(sandbox.id)
    assert row is not None
    assert (row.state, row.failure_message) == (SandboxState.FAILED, "broken")
    assert host.held_without_consoles() == []


@pytest.mark.parametrize("operation", STEPS)
async def test_destroy_wins_at_any_step(host: Host, operation: str) -> None:
    lifecycle = host.lifecycle()
    host.hang(operation)
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await host.reach(operation)
    await lifecycle.destroy(sandbox.id)
    assert host.held() == []
    assert host.row(sandbox.id) is None
    assert host.states() == ["creating", "destroying", "sandbox.destroyed"]


@pytest.mark.parametrize("operation", FREES)
async def test_destroy_joins_an_unwinding(host: Host, operation: str) -> None:
    lifecycle = host.lifecycle()
    host.hang(operation)
    host.faults.fail_next("start_process", HostError("broken"))
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await host.reach(operation)
    await lifecycle.destroy(sandbox.id, wait=False)
    await lifecycle.destroy(sandbox.id, wait=False)
    waiting = asyncio.create_task(lifecycle.destroy(sandbox.id))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    host.faults.release(operation)
    await waiting
    assert host.held() == []
    assert host.row(sandbox.id) is None


async def test_destroy_of_nothing(host: Host) -> None:
    lifecycle = host.lifecycle()
    with pytest.raises(NotFoundError) as missing:
        await lifecycle.destroy("aaaaaaaaaaaa")
    assert missing.value.code == "sandbox_not_found"
    sandbox = await host.created(lifecycle)
    await lifecycle.destroy(sandbox.id)
    with pytest.raises(NotFoundError):
        await lifecycle.destroy(sandbox.id)


# --- the guest ----------------------------------------------------------------------------------------------------


async def test_a_machine_that_dies_while_booting_ends_the_creation_at_once(host: Host) -> None:
    lifecycle = host.lifecycle()
    host.hang("wait_ready")
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await host.reach("wait_ready")
    host.vmm.run_directories[host.run.vmm_directory(sandbox.id)] += b"\x1b[31mKernel panic\x1b[0m\r\n\x00"
    host.vmm.end_machine(sandbox.id)
    settled = await lifecycle.wait_settled(sandbox.id, 20)
    assert settled is not None
    assert (settled.state, settled.failure_code) == (SandboxState.FAILED, "vmm_ended")
    assert settled.console_tail.endswith("started\nKernel panic")
    assert host.held_without_consoles() == []
    kept = host.data.consoles / f"{sandbox.id}.log"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert await lifecycle.console(settled, 100) == kept.read_bytes()
    assert (await lifecycle.console(settled, 4))[-1:] == b"\x00"
    await lifecycle.destroy(sandbox.id)
    assert host.held() == []


async def test_a_guest_that_never_answers_is_not_tried_again(host: Host) -> None:
    host.limits = LifecycleLimits(guest_ready_seconds=17)
    host.faults.fail_next("wait_ready", TimeoutExceededError("too late"))
    sandbox = await host.created(host.lifecycle())
    assert sandbox.failure_code == "guest_not_ready"
    assert "17 s" in sandbox.failure_message
    assert sandbox.console_tail
    assert host.calls.count("wait_ready") == 1


async def test_long_consoles_are_cut(host: Host) -> None:
    lifecycle = host.lifecycle()
    host.hang("wait_ready")
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await host.reach("wait_ready")
    host.vmm.run_directories[host.run.vmm_directory(sandbox.id)] += b"line of the kernel\n" * 100_000 + b"the end"
    host.vmm.end_machine(sandbox.id)
    settled = await lifecycle.wait_settled(sandbox.id, 20)
    assert settled is not None
    assert len(settled.console_tail) <= 4096
    assert settled.console_tail.endswith("the end")
    assert (host.data.consoles / f"{sandbox.id}.log").stat().st_size <= 256 * 1024


async def test_a_console_that_cannot_be_read_costs_the_tail_only(host: Host) -> None:
    host.faults.fail_next("console_tail")
    host.faults.fail_next("initialize", HostError("broken"))
    sandbox = await host.created(host.lifecycle())
    assert (sandbox.failure_message, sandbox.console_tail) == ("broken", "")


async def test_the_file_system_is_grown_only_when_there_is_room(host: Host) -> None:
    host.images.size_mib = 4096
    sandbox = await host.created(host.lifecycle(), disk_mib=4096)
    assert sandbox.state is SandboxState.RUNNING
    assert host.guests.processes == []


async def test_a_file_system_that_does_not_grow_is_a_failure(host: Host) -> None:
    host.guests.exit_code, host.guests.output = 1, b"bad superblock"
    sandbox = await host.created(host.lifecycle())
    assert sandbox.failure_code == "file_system_not_grown"
    assert "bad superblock" in sandbox.failure_message


async def test_an_image_without_resize2fs_is_a_warning(host: Host) -> None:
    host.guests.exit_code = 127
    sandbox = await host.created(host.lifecycle())
    assert sandbox.state is SandboxState.RUNNING
    assert "sandbox.warning" in host.states()


async def test_boots_take_turns(host: Host) -> None:
    host.limits = LifecycleLimits(concurrent_boots=2)
    lifecycle = host.lifecycle()
    host.hang("wait_ready")
    made = [await lifecycle.start_create(f"n{number}", SandboxSpec()) for number in range(5)]
    for _ in range(1000):
        if host.calls.count("ensure_channel") == 5 and host.calls.count("wait_ready") == 2:
            break
        await asyncio.sleep(0.005)
    assert len(host.vmm.running) == 2
    await lifecycle.destroy(made[4].id)  # one that waits
    await lifecycle.destroy(made[0].id)  # one that boots: its place is free
    host.faults.release("wait_ready")
    for sandbox in made[1:4]:
        settled = await lifecycle.wait_settled(sandbox.id, 20)
        assert settled is not None
        assert settled.state is SandboxState.RUNNING
    assert len(host.vmm.running) == 3


# --- asking for it ------------------------------------------------------------------------------------------------


async def test_a_taken_name_leaves_nothing(host: Host) -> None:
    lifecycle = host.lifecycle()
    first = await host.created(lifecycle)
    with pytest.raises(ConflictError) as taken:
        await lifecycle.start_create("one", SandboxSpec())
    assert taken.value.code == "name_taken"
    await lifecycle.destroy(first.id)
    assert host.held() == []


async def test_capacity_says_what_is_short(host: Host) -> None:
    lifecycle = host.lifecycle(room=RoomPolicy(fixed=Capacity(vcpu_count=4, memory_mib=1200, disk_mib=9000)))
    await host.created(lifecycle, memory_mib=512)
    with pytest.raises(CapacityError) as short:
        await lifecycle.start_create("two", SandboxSpec(memory_mib=1000))
    assert "1000 MiB asked for, 688 MiB of 1200 MiB free, 312 MiB short" in short.value.message
    assert "vCPU" not in short.value.message
    with pytest.raises(CapacityError) as never:
        await lifecycle.start_create("two", SandboxSpec(vcpu_count=9))
    assert "does not have that much" in never.value.hint
    with pytest.raises(CapacityError, match="disk"):
        await lifecycle.start_create("two", SandboxSpec(disk_mib=5000))
    assert host.row("two") is None


async def test_two_cannot_share_the_last_place(host: Host) -> None:
    lifecycle = host.lifecycle(room=RoomPolicy(fixed=Capacity(memory_mib=5 * 512)))
    results = await asyncio.gather(
        *(lifecycle.start_create(f"n{number}", SandboxSpec()) for number in range(20)), return_exceptions=True
    )
    assert sum(isinstance(result, CapacityError) for result in results) == 15
    assert len(await host.fleet(lifecycle).destroy_all()) == 5


async def test_a_failed_creation_gives_its_place_back(host: Host) -> None:
    lifecycle = host.lifecycle(room=RoomPolicy(fixed=Capacity(disk_mib=4096)))
    host.faults.fail_next("initialize", HostError("broken"))
    await host.created(lifecycle)
    assert (await host.created(lifecycle, "two")).state is SandboxState.RUNNING


async def test_a_caller_that_goes_away_stops_nothing(host: Host) -> None:
    lifecycle = host.lifecycle()
    asking = asyncio.create_task(lifecycle.start_create("one", SandboxSpec()))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    for _ in range(1000):
        row = host.row("one")
        if row is not None and row.state is SandboxState.RUNNING:
            break
        await asyncio.sleep(0.005)
    row = host.row("one")
    assert row is not None
    assert row.state is SandboxState.RUNNING
    asking = asyncio.create_task(lifecycle.destroy(row.id))
    await asyncio.sleep(0)
    asking.cancel()
    for _ in range(1000):
        if host.row("one") is None:
            break
        await asyncio.sleep(0.005)
    assert host.row("one") is None
    assert host.held() == []


async def test_waiting_ends_by_time_and_by_destruction(host: Host) -> None:
    lifecycle = host.lifecycle()
    host.hang("initialize")
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    assert await lifecycle.wait_settled(sandbox.id, 0.02) is None
    waiting = asyncio.create_task(lifecycle.wait_settled(sandbox.id, 20))
    await host.reach("initialize")
    await lifecycle.destroy(sandbox.id)
    with pytest.raises(NotFoundError):
        await waiting


async def test_few_writes_per_creation(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is an fsync: the insert, one per resource, the end; what needs no undo shares one of these."""
    writes = 0
    write = host.database.write

    async def counting(function):
        nonlocal writes
        writes += 1
        return await write(function)

    monkeypatch.setattr(host.database, "write", counting)
    monkeypatch.setattr("atelier.lifecycle.progress.ProgressEvents.report", lambda self, progress: None)
    await host.created(host.lifecycle())
    assert writes == 8
