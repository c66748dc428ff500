"""Doctor tells of stuck work, from the database alone: with a manager or without."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.running_manager import run_manager, start_manager, stop_manager


def findings(environment: dict[str, str]) -> tuple[int, dict[str, Any]]:
    done = run_manager(environment, "--doctor", "--json")
    return done.returncode, {each["name"]: each for each in json.loads(done.stdout)["checks"]}


def test_stuck_work_is_told_with_its_remedy(tmp_path: Path) -> None:
    manager = start_manager(tmp_path, "--on-exit", "keep")
    with manager.client() as client:
        client.post("/api/v1/sandboxes?wait=true", json={"name": "box"})
    status, found = findings(manager.environment)
    assert (status, found["sandboxes"]["status"]) == (0, "ok")
    assert stop_manager(manager) == 0
    with closing(sqlite3.connect(manager.data_dir / "atelier.db")) as database, database:
        database.execute(
            "UPDATE sandboxes SET failure_code = 'stop_stuck', failure_message = 'it hangs', failure_hint = 'mend it'"
        )
    status, found = findings(manager.environment)
    assert status == 1
    assert found["sandbox box"] == {
        "name": "sandbox box",
        "status": "failed",
        "message": "it hangs",
        "remedy": "mend it",
    }
    (manager.data_dir / "atelier.db").write_bytes(b"no database" * 1000)
    status, found = findings(manager.environment)
    assert status == 1
    assert found["database"]["remedy"]
