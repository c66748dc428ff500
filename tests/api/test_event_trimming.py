"""A manager lets old events go by itself, and tells a client that resumes before them."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

from tests.running_manager import start_manager, stop_manager


def test_old_events_go_and_a_client_that_wants_them_is_told() -> None:
    with tempfile.TemporaryDirectory(prefix="atl-") as name:  # short: sockets lie below it
        folder = Path(name)
        assert stop_manager(start_manager(folder)) == 0
        database = folder / "data" / "atelier.db"
        with closing(sqlite3.connect(database)) as connection:
            connection.executemany(
                "INSERT INTO outbox (id, at, kind, payload) VALUES (?, '2001-02-03T04:05:06.000000+00:00', 'k', '{}')",
                [(number,) for number in range(1, 2501)],
            )
            connection.commit()
        running = start_manager(folder)
        try:
            deadline = time.monotonic() + 60
            with closing(sqlite3.connect(database)) as connection:
                while connection.execute("SELECT min(id) FROM outbox").fetchone() != (2500,):
                    assert time.monotonic() < deadline, "they are still there"
                    time.sleep(0.05)
            with (
                running.client() as client,
                client.stream("GET", "/api/v1/events", headers={"Last-Event-ID": "7"}) as stream,
            ):
                first = next(line for line in stream.iter_lines() if line.startswith("data: "))
            gap = json.loads(first.removeprefix("data: "))
            assert (gap["kind"], gap["id"]) == ("stream.gap", 2499)
            assert gap["payload"] == {"reason": "trimmed", "first_lost_id": 8, "last_lost_id": 2499}
        finally:
            assert stop_manager(running) == 0
