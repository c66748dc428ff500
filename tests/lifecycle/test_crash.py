"""A manager that dies at every place of every saga, by a real ``os._exit``, and the start after it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from tests.forked_programs import PROCESSES
from tests.lifecycle import crash_program
from tests.lifecycle.sabotage import NAME, Place, check_holdings, end_of_unwinding, last_that_unwinds
from tests.lifecycle.test_every_saga import DOS, SETTLED_WELL, UNDOS, saga_of

from atelier.db.sagas import list_open_sagas_of
from atelier.db.sandboxes import SandboxRepository
from atelier.model.errors import NotFoundError
from atelier.model.sandbox import Sandbox
from atelier.model.states import SandboxState


def crash(folder: Path, scenario: str, place: Place) -> None:
    """Run a manager until it kills itself."""
    process = PROCESSES.Process(target=crash_program.run, args=(folder, scenario, str(place)))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode == crash_program.CRASHED, (folder / crash_program.LOG).read_text()


def held(folder: Path) -> set[str]:
    memories = {"memory" for _ in (folder / "data/paused").glob("*.memory")}
    return memories | {file.name.partition("-")[0] for file in (folder / "resources").iterdir()}


async def start_after(folder: Path) -> Sandbox:
    """What the next start makes of it, once all is settled; and a clean slate when it is destroyed."""
    database, lifecycle = crash_program.make_lifecycle(folder, crash_program.FileDrivers(folder / "resources"))
    try:
        repository = SandboxRepository()
        await lifecycle.recover()
        with database.read() as connection:
            sandbox_id = repository.get(connection, NAME).id
        row = await lifecycle.wait_settled(sandbox_id, 60)
        assert row is not None
        check_holdings(row, held(folder))
        await lifecycle.destroy(row.id)
        assert held(folder) == set()
        with database.read() as connection:
            assert repository.find(connection, NAME) is None
            assert list_open_sagas_of(connection, sandbox_id) == []
        return row
    finally:
        await lifecycle.close()
        database.close()


@pytest.mark.parametrize("place", DOS, ids=str)
async def test_a_saga_that_a_crash_ended_goes_on(tmp_path: Path, place: Place) -> None:
    crash(tmp_path, place.kind, place)
    row = await start_after(tmp_path)
    assert row.state in SETTLED_WELL, row.failure_message
    assert row.failure_code == ""


@pytest.mark.parametrize("place", UNDOS, ids=str)
async def test_an_unwinding_that_a_crash_ended_goes_on(tmp_path: Path, place: Place) -> None:
    crash(tmp_path, place.kind, place)
    row = await start_after(tmp_path)
    saga = saga_of(place)
    last = Place(place.kind, last_that_unwinds(saga), "do", "after")
    assert row.state is end_of_unwinding(last, saga)
    assert "so that it is unwound" in row.failure_message


@pytest.mark.parametrize("place", [each for each in UNDOS if each.kind == "sandbox_create"], ids=str)
async def test_a_destruction_that_a_crash_ended_goes_on(tmp_path: Path, place: Place) -> None:
    crash(tmp_path, "destroy", place)
    database, lifecycle = crash_program.make_lifecycle(tmp_path, crash_program.FileDrivers(tmp_path / "resources"))
    try:
        with database.read() as connection:
            row = SandboxRepository().find(connection, NAME)
        await lifecycle.recover()
        if row is not None:
            assert row.state is SandboxState.DESTROYING
            with contextlib.suppress(NotFoundError):  # the start has gone on with it by itself
                await lifecycle.destroy(row.id)
        assert held(tmp_path) == set()
        with database.read() as connection:
            assert SandboxRepository().find(connection, NAME) is None
    finally:
        await lifecycle.close()
        database.close()
