"""What a start finds: sagas cut off anywhere, machines that live on, machines that are gone; and the running ones."""

from __future__ import annotations

import asyncio

import pytest
from tests.lifecycle.conftest import Host
from tests.lifecycle.test_sandbox_create import FREES, STEPS

from atelier.model.errors import HostError
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState


async def settle(host: Host, sandbox_id: str) -> Sandbox | None:
    lifecycle = host.lifecycles[-1]
    return await lifecycle.wait_settled(sandbox_id, 20)


async def gone(host: Host, sandbox_id: str) -> bool:
    for _ in range(2000):
        if host.row(sandbox_id) is None:
            return True
        await asyncio.sleep(0.005)
    return False


@pytest.mark.parametrize("operation", STEPS)
async def test_a_creation_cut_off_anywhere_goes_on(host: Host, operation: str) -> None:
    lifecycle = host.lifecycle()
    host.hang(operation)
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await host.reach(operation)
    await lifecycle.close()
    host.faults.release(operation)
    row = host.row(sandbox.id)
    assert row is not None
    assert row.state is SandboxState.CREATING

    again = host.lifecycle()
    await again.recover()
    settled = await settle(host, sandbox.id)
    assert settled is not None
    assert settled.state is SandboxState.RUNNING, settled.failure_message
    assert len(host.vmm.running) == 1
    await again.destroy(sandbox.id)
    assert host.held() == []


@pytest.mark.parametrize("operation", FREES)
async def test_a_destruction_cut_off_anywhere_goes_on(host: Host, operation: str) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.hang(operation)
    await lifecycle.destroy(sandbox.id, wait=False)
    await host.reach(operation)
    await lifecycle.close()
    host.faults.release(operation)

    again = host.lifecycle()
    await again.recover()
    assert await gone(host, sandbox.id)
    assert host.held() == []
    assert host.states()[-1] == "sandbox.destroyed"


async def test_machines_that_live_on_are_taken_up_and_watched(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    await lifecycle.close()
    channel = host.guests.channels.pop(sandbox.id)  # as after a restart of the gateway too

    again = host.lifecycle()
    await again.recover()
    row = host.row(sandbox.id)
    assert row is not None
    assert row.state is SandboxState.RUNNING
    assert host.guests.channels[sandbox.id] == channel
    assert host.vmm.running == [sandbox.id]

    host.vmm.end_machine(sandbox.id)
    for _ in range(1000):
        if (row := host.row(sandbox.id)) and row.state is SandboxState.FAILED:
            break
        await asyncio.sleep(0.005)
    assert row is not None
    assert row.failure_code == "vmm_ended"


async def test_a_machine_that_is_gone_makes_the_sandbox_failed(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    await lifecycle.close()
    host.vmm.end_machine(sandbox.id)
    again = host.lifecycle()
    await again.recover()
    row = host.row(sandbox.id)
    assert row is not None
    assert (row.state, row.failure_code) == (SandboxState.FAILED, "vmm_ended")
    assert "gone when the manager looked" in row.failure_message
    assert sandbox.id in host.storage.volumes  # somebody's disk
    await again.destroy(sandbox.id)
    assert host.held() == []


async def test_one_that_cannot_be_taken_up_is_left_alone(host: Host) -> None:
    lifecycle = host.lifecycle()
    first, second = await host.created(lifecycle), await host.created(lifecycle, "two")
    await lifecycle.close()
    host.faults.fail_next("ensure_channel", HostError("gateway is down"))
    again = host.lifecycle()
    await again.recover()
    for sandbox in (first, second):
        row = host.row(sandbox.id)
        assert row is not None
        assert row.state is SandboxState.RUNNING
    assert sorted(await host.fleet(again).destroy_all()) == ["one", "two"]
    assert host.held() == []


async def test_a_machine_that_ends_by_itself_is_noticed(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    host.vmm.end_machine(sandbox.id)
    for _ in range(1000):
        if (row := host.row(sandbox.id)) and row.state is SandboxState.FAILED:
            break
        await asyncio.sleep(0.005)
    assert row is not None
    assert (row.state, row.failure_code) == (SandboxState.FAILED, "vmm_ended")
    assert "started" in row.console_tail
    assert host.states() == ["creating", "running", "failed"]
    await lifecycle.destroy(sandbox.id)
    assert host.held() == []


async def test_destroy_all_names_what_is_gone_and_keeps_what_is_stuck(host: Host) -> None:
    lifecycle = host.lifecycle()
    for number in range(30):
        await lifecycle.start_create(f"n{number:02}", SandboxSpec())
    stuck = await host.created(lifecycle, "stuck")
    ensure_volume_absent = host.storage.ensure_volume_absent

    async def refuse(sandbox_id: str) -> None:
        if sandbox_id == stuck.id:
            raise HostError("held")
        await ensure_volume_absent(sandbox_id)

    host.storage.ensure_volume_absent = refuse  # type: ignore[method-assign]
    assert await host.fleet(lifecycle).destroy_all() == [f"n{number:02}" for number in range(30)]
    assert {each.split()[-1] for each in host.held()} == {stuck.id}


async def test_consoles_are_trimmed_and_one_trouble_stops_no_other(host: Host) -> None:
    lifecycle = host.lifecycle()
    first, second = await host.created(lifecycle), await host.created(lifecycle, "two")
    for sandbox in (first, second):
        host.vmm.run_directories[host.run.vmm_directory(sandbox.id)] += b"x" * 2_000_000
    host.faults.fail_next("trim_console")
    await host.fleet(lifecycle).trim_consoles()
    sizes = sorted(len(console) for console in host.vmm.run_directories.values())
    assert sizes[0] <= 1024 * 1024 < sizes[1]
    assert len(await lifecycle.console(first, 10)) == 10
