"""A manager that dies in the middle, by a real ``os._exit``, and the start after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.lifecycle import crash_program

from atelier.db.sandboxes import SandboxRepository
from atelier.model.sandbox import Sandbox
from atelier.model.states import SandboxState

ROOT = Path(__file__).resolve().parents[2]


def crash(folder: Path, operation: str, moment: str) -> list[str]:
    """Run a manager until it kills itself; returns the resources it left behind."""
    program = [sys.executable, "-m", "tests.lifecycle.crash_program", str(folder), operation, moment]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == crash_program.CRASHED, ended.stderr
    return sorted(file.name.partition("-")[0] for file in (folder / "resources").iterdir())


async def start_after(folder: Path) -> Sandbox | None:
    """What the next start makes of it: the row once all is settled, None if it is gone."""
    database, lifecycle = crash_program.make_lifecycle(folder, crash_program.FileDrivers(folder / "resources"))
    try:
        repository = SandboxRepository()
        with database.read() as connection:
            row = repository.get(connection, "one")
        await lifecycle.recover()
        if row.state is SandboxState.DESTROYING:
            await lifecycle.destroy(row.id)
        else:
            await lifecycle.wait_settled(row.id, 60)
        with database.read() as connection:
            return repository.find(connection, "one")
    finally:
        await lifecycle.close()
        database.close()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("operation", ["ensure_slot", "ensure_volume", "ensure_started", "initialize"])
async def test_a_creation_that_a_crash_ended_is_unwound(tmp_path: Path, operation: str, moment: str) -> None:
    left = crash(tmp_path, operation, moment)
    assert (left == []) == ((operation, moment) == ("ensure_slot", "before"))
    row = await start_after(tmp_path)
    assert row is not None
    assert (row.state, row.failure_code) == (SandboxState.FAILED, "interrupted")
    assert list((tmp_path / "resources").iterdir()) == []


@pytest.mark.parametrize("operation", ["ensure_stopped", "ensure_volume_absent", "ensure_slot_absent"])
async def test_a_destruction_that_a_crash_ended_goes_on(tmp_path: Path, operation: str) -> None:
    left = crash(tmp_path, f"destroy:{operation}", "after")
    assert ("slot" in left) == (operation != "ensure_slot_absent")
    assert await start_after(tmp_path) is None
    assert list((tmp_path / "resources").iterdir()) == []
