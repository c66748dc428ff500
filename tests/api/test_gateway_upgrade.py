"""A manager that finds a gateway of another version replaces it; one of its own version it uses on."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import atelier
from atelier.host import processes
from atelier.manager.gateway_process import GatewayProcess
from atelier.model.layout import RunLayout


@pytest.fixture
async def run() -> AsyncIterator[RunLayout]:
    # Short: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        yield RunLayout(Path(folder))


def gateway(run: RunLayout) -> GatewayProcess:
    return GatewayProcess(run.root, run.gateway_socket, run.root / "gateway.log")


async def pid_of(process: GatewayProcess) -> int:
    answer = await process._ping()
    assert answer is not None
    return answer.pid


async def test_an_upgraded_manager_replaces_the_gateway(run: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gateway(run)
    await first.open()
    pid = await pid_of(first)
    await first.release()

    second = gateway(run)
    await second.open()
    assert await pid_of(second) == pid, "a restart of the manager disturbs nobody"
    await second.release()

    monkeypatch.setattr(atelier, "__version__", "999.0")
    third = gateway(run)
    await third.open()
    replaced = await pid_of(third)
    assert replaced != pid
    assert processes.find_identity(pid) is None
    await third.close()
    assert processes.find_identity(replaced) is None
    assert await third._ping() is None
