"""A manager with templates, as by default, once the template of the base image is ready: then nothing more is made by itself."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Generator
from pathlib import Path

from benchmarks.api_client import ApiClient
from benchmarks.bare_machine import Ingredients
from benchmarks.manager_process import running_manager
from benchmarks.progress import say

_TEMPLATE_SECONDS = 300.0


@contextlib.contextmanager
def templated_manager(folder: Path, ingredients: Ingredients) -> Generator[tuple[ApiClient, str]]:
    """A client of it, and the template's id."""
    variables = {"ATELIER_TEMPLATES": "on"}
    with (
        running_manager(folder, "local", ingredients.accelerator, ingredients.cache_dir, variables) as manager,
        manager.client() as client,
    ):
        client.destroy(client.create("first"))
        template = _await_template(folder / "data")
        say(f"template {template} is ready")
        yield client, template


def _await_template(data_dir: Path) -> str:
    """Id of the template that the first create has led to; it is in no list of the API's."""
    deadline = time.monotonic() + _TEMPLATE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.closing(sqlite3.connect(f"file:{data_dir / 'atelier.db'}?mode=ro", uri=True)) as database:
            ready = database.execute(
                "SELECT id FROM snapshots WHERE purpose = 'template' AND state = 'ready'"
            ).fetchone()
            left = database.execute("SELECT count(*) FROM sandboxes").fetchone()
        if ready is not None and left == (0,):
            return str(ready[0])
        time.sleep(0.2)
    raise TimeoutError("no template was made")
