"""Every saga of sandboxes hurt at every place, on fakes: errors, hanging, repetition, destruction; and a clean slate after each."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.lifecycle.conftest import Host
from tests.lifecycle.crash_program import FileDrivers, make_lifecycle
from tests.lifecycle.sabotage import (
    Place,
    bring_about,
    check_holdings,
    disturb,
    end_of_unwinding,
    last_that_unwinds,
    places,
    way_to,
)

from atelier.db.sagas import list_open_sagas_of
from atelier.lifecycle import operations, sandbox_claim, sandbox_create, sandbox_resume
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import ConflictError, HostError
from atelier.model.sandbox import Sandbox
from atelier.model.states import UNDER_WAY, SandboxState
from atelier.saga.definition import SagaDefinition


def find_sagas() -> tuple[SagaDefinition[object], ...]:
    """As the lifecycle has them, whatever drivers it is given."""

    async def build() -> tuple[SagaDefinition[object], ...]:
        database, lifecycle = make_lifecycle(Path("/nonexistent"), FileDrivers(Path("/nonexistent")), opened=False)
        del database
        return tuple(each for each in lifecycle.sagas if each.kind.startswith("sandbox_"))  # type: ignore[return-value]

    return asyncio.run(build())


SAGAS = find_sagas()
DOS = places(SAGAS, "do")
UNDOS = places(SAGAS, "undo")
SETTLED_WELL = (SandboxState.RUNNING, SandboxState.STOPPED, SandboxState.PAUSED)
DO_BEFORE = [place for place in DOS if place.moment == "before"]


def saga_of(place: Place) -> SagaDefinition[object]:
    return next(saga for saga in SAGAS if saga.kind == place.kind)


def open_sagas(host: Host, sandbox_id: str) -> list[str]:
    with host.database.read() as connection:
        return [record.kind for record in list_open_sagas_of(connection, sandbox_id)]


async def settled(lifecycle: SandboxLifecycle, sandbox_id: str) -> Sandbox:
    row = await lifecycle.wait_settled(sandbox_id, 30)
    assert row is not None, "it did not settle"
    return row


async def check_clean_end(host: Host, lifecycle: SandboxLifecycle, row: Sandbox) -> None:
    """It holds what its state says; and nothing at all is left once it is destroyed."""
    check_holdings(row, host.held_by(row.id))
    assert open_sagas(host, row.id) == []
    await lifecycle.destroy(row.id)
    assert host.held() == []
    assert host.row(row.id) is None
    assert host.saga(row.id) is None
    assert open_sagas(host, row.id) == []


async def held_at(host: Host, place: Place) -> tuple[SandboxLifecycle, str]:
    """A manager one of whose sagas stands still at ``place``, and the sandbox's id."""
    lifecycle = host.lifecycle()
    reached_it = asyncio.Event()

    async def hang(reached: Place) -> None:
        if reached == place:
            reached_it.set()
            await asyncio.Event().wait()

    disturb(lifecycle, hang)
    sandbox_id = await bring_about(lifecycle, place.kind)
    await reached_it.wait()
    return lifecycle, sandbox_id


def test_every_saga_can_be_brought_about() -> None:
    begun_otherwise = {sandbox_create.KIND, sandbox_claim.KIND}
    for saga in SAGAS:
        if saga.kind not in begun_otherwise:
            assert way_to(saga.kind, SandboxState.RUNNING)
    assert {each.kind for each in operations.OPERATIONS} == {saga.kind for saga in SAGAS} - begun_otherwise


@pytest.mark.parametrize("kind", [saga.kind for saga in SAGAS])
async def test_undisturbed(host: Host, kind: str) -> None:
    lifecycle = host.lifecycle()
    row = await settled(lifecycle, await bring_about(lifecycle, kind))
    assert row.state in SETTLED_WELL
    assert row.failure_code == ""
    await check_clean_end(host, lifecycle, row)


@pytest.mark.parametrize("kind", [saga.kind for saga in SAGAS])
async def test_every_do_and_undo_may_run_twice(host: Host, kind: str) -> None:
    lifecycle = host.lifecycle()

    async def nothing(place: Place) -> None:
        return

    disturb(lifecycle, nothing, times=2)
    row = await settled(lifecycle, await bring_about(lifecycle, kind))
    assert row.state in SETTLED_WELL
    await check_clean_end(host, lifecycle, row)


@pytest.mark.parametrize("place", DOS, ids=str)
async def test_an_error_at_any_place(host: Host, place: Place) -> None:
    """Once: before the pivot the saga unwinds and says why; from the pivot on it tries again and ends well."""
    lifecycle = host.lifecycle()
    errors = [HostError("broken on purpose", code="on_purpose")]

    async def fail(reached: Place) -> None:
        if reached == place and errors:
            raise errors.pop()

    disturb(lifecycle, fail)
    row = await settled(lifecycle, await bring_about(lifecycle, place.kind))
    assert errors == []
    if saga_of(place).is_past_pivot(place.step):
        assert row.failure_code == ""
    else:
        expected = end_of_unwinding(place, saga_of(place))
        assert (row.state, row.failure_code) == (expected, "on_purpose")
        check_holdings(row, host.held_by(row.id))
        # What failed can be started again, whether it has a disk or not; the rest can be tried again.
        again = {
            SandboxState.FAILED: lifecycle.start,
            SandboxState.PAUSED: lifecycle.resume,
            SandboxState.RUNNING: lifecycle.pause,
        }
        await again[expected](row.id)
        row = await settled(lifecycle, row.id)
        assert row.state in SETTLED_WELL, row.failure_message
    await check_clean_end(host, lifecycle, row)


@pytest.mark.parametrize("place", [each for each in DOS if saga_of(each).is_past_pivot(each.step)], ids=str)
async def test_what_is_stuck_past_the_pivot_is_told_and_tried_again(host: Host, place: Place) -> None:
    lifecycle = host.lifecycle()
    broken = True

    async def fail(reached: Place) -> None:
        if reached == place and broken:
            raise HostError("in the way", hint="move it")

    disturb(lifecycle, fail)
    sandbox_id = await bring_about(lifecycle, place.kind)
    row = await settled(lifecycle, sandbox_id)
    assert row.failure_code == f"{place.kind.removeprefix('sandbox_')}_stuck"
    assert "in the way" in row.failure_message
    assert row.failure_hint == "move it, then: atelier retry one"
    assert host.states()[-1] == "sandbox.stuck"
    broken = False
    await lifecycle.retry(sandbox_id)
    row = await settled(lifecycle, sandbox_id)
    assert row.failure_code == ""
    assert row.state not in UNDER_WAY
    with pytest.raises(ConflictError) as nothing:
        await lifecycle.retry(sandbox_id)
    assert nothing.value.code == "nothing_stuck"
    await check_clean_end(host, lifecycle, row)


@pytest.mark.parametrize("failures", [2, 1000], ids=["for a while", "for good"])
@pytest.mark.parametrize("place", UNDOS, ids=str)
async def test_an_error_in_any_undo(host: Host, place: Place, failures: int) -> None:
    """For a while: nobody notices. For good: it is told, and goes on once a person has mended it."""
    lifecycle = host.lifecycle()
    left = failures
    last = Place(place.kind, last_that_unwinds(saga_of(place)), "do", "after")
    unwound = False

    async def fail(reached: Place) -> None:
        nonlocal left, unwound
        if reached == last and not unwound:
            unwound = True
            raise HostError("so that it is unwound", code="on_purpose")
        if reached == place and left:
            left -= 1
            raise HostError("held by somebody")

    disturb(lifecycle, fail)
    sandbox_id = await bring_about(lifecycle, place.kind)
    row = await settled(lifecycle, sandbox_id)
    expected = end_of_unwinding(last, saga_of(last))
    assert row.state is expected or row.failure_code.endswith("_stuck")
    if failures == 2:
        assert row.failure_code == "on_purpose"
    else:
        assert row.failure_code == f"{place.kind.removeprefix('sandbox_')}_stuck"
        assert "held by somebody" in row.failure_message
        left = 0
        await lifecycle.retry(sandbox_id)
        for _ in range(1000):
            if not open_sagas(host, sandbox_id):
                break
            await asyncio.sleep(0.005)
        row = host.row(sandbox_id)
        assert row is not None
    assert (row.state, row.failure_code) == (expected, "on_purpose")
    await check_clean_end(host, lifecycle, row)


@pytest.mark.parametrize("place", DOS, ids=str)
async def test_destroy_wins_at_any_place(host: Host, place: Place) -> None:
    lifecycle, sandbox_id = await held_at(host, place)
    if place.kind != sandbox_create.KIND:
        with pytest.raises(ConflictError):
            await lifecycle.resize(sandbox_id, 100_000)
    await lifecycle.destroy(sandbox_id)
    assert host.held() == []
    assert host.row(sandbox_id) is None
    assert open_sagas(host, sandbox_id) == []


@pytest.mark.parametrize("place", DO_BEFORE, ids=str)
async def test_a_manager_that_ends_in_order_at_any_place(host: Host, place: Place) -> None:
    """Its sagas stop where they are; the next manager goes on and ends them well."""
    lifecycle, sandbox_id = await held_at(host, place)
    await lifecycle.close()
    again = host.lifecycle()
    await again.recover()
    row = await settled(again, sandbox_id)
    assert row.state in SETTLED_WELL, row.failure_message
    await check_clean_end(host, again, row)


@pytest.mark.parametrize("place", DO_BEFORE, ids=str)
async def test_a_reboot_of_the_host_at_any_place(host: Host, place: Place) -> None:
    """All machines, sockets and run directories are gone; disks are not."""
    lifecycle, sandbox_id = await held_at(host, place)
    await lifecycle.close()
    host.reboot()
    again = host.lifecycle()
    await again.recover()
    for _ in range(1000):
        row = await settled(again, sandbox_id)
        if row.state is not SandboxState.RUNNING or host.vmm.running:
            break
        await asyncio.sleep(0.005)
    if row.failure_code == "saved_memory_missing":
        # Its guest was about to run on from a memory that was given up for that; the disk is left.
        assert end_of_unwinding(place, saga_of(place)) is SandboxState.FAILED
        assert place.kind == sandbox_resume.KIND
        await again.start(row.id)
        row = await settled(again, row.id)
    assert row.state in SETTLED_WELL, row.failure_message
    await check_clean_end(host, again, row)
