"""Ten real sandboxes at once, all removed without a trace; a gateway that is killed while guests work.

The ten are restored; that many boot at once in ``test_kill_under_load``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.footprint import gateway_pid, paths_naming, processes_naming
from tests.running_manager import WITH_TEMPLATES, RunningManager, running_local_manager, wait_for_template

from atelier import Sandbox
from atelier.model.errors import AtelierError
from atelier.model.guest import ProcessOutput

COUNT = 10


@pytest.fixture(scope="module")
def own_manager() -> Iterator[RunningManager]:
    with running_local_manager(WITH_TEMPLATES) as running:
        with create(running, "first"):
            wait_for_template(running)
        yield running
    assert processes_naming(str(running.run_dir.parent)) == []


def create(manager: RunningManager, name: str) -> Sandbox:
    return Sandbox.create(name=name, memory_mib=256, api_url=manager.url, api_key=manager.key, timeout_seconds=900)


def test_ten_at_once_and_nothing_left(own_manager: RunningManager) -> None:
    with ThreadPoolExecutor(COUNT) as pool:
        sandboxes = list(pool.map(lambda number: create(own_manager, f"many-{number}"), range(COUNT)))
        names = list(pool.map(lambda sandbox: sandbox.run(["hostname"]).stdout.strip(), sandboxes))
        assert names == [f"many-{number}" for number in range(COUNT)]
        identities = set(pool.map(lambda sandbox: sandbox.run(["cat", "/etc/machine-id"]).stdout, sandboxes))
        assert len(identities) == COUNT
        ids = [sandbox.id for sandbox in sandboxes]
        assert all(len(processes_naming(sandbox_id)) == 1 for sandbox_id in ids)
        list(pool.map(lambda sandbox: sandbox.destroy(), sandboxes))
    for sandbox_id in ids:
        assert processes_naming(sandbox_id) == []
        assert paths_naming(sandbox_id, own_manager.run_dir, own_manager.data_dir) == []


def test_a_killed_gateway_is_replaced_and_guests_work_on(own_manager: RunningManager) -> None:
    with create(own_manager, "steady") as sandbox:
        with sandbox.exec("echo begun; exec sleep 7654") as program:
            assert any(isinstance(event, ProcessOutput) for event in program if not hasattr(event, "pid"))
        before = gateway_pid(own_manager)
        os.kill(before, signal.SIGKILL)
        deadline = time.monotonic() + 60
        answered = ""
        while time.monotonic() < deadline and not answered:
            try:
                answered = sandbox.run(["pgrep", "-af", "sleep 7654"]).stdout
            except AtelierError:
                time.sleep(0.2)
        assert "sleep 7654" in answered
        assert gateway_pid(own_manager) != before
