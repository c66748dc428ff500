"""What a service says to the service manager, on a socket as systemd's."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from atelier.host.service_notices import stay_alive, tell_service_manager, watchdog_seconds


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(30)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return manager


def test_a_state_is_told(listening: socket.socket) -> None:
    tell_service_manager("READY=1", "STATUS=ready")
    assert listening.recv(100) == b"READY=1\nSTATUS=ready"


def test_an_abstract_socket_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"atelier-notices-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        tell_service_manager("STOPPING=1")
        assert manager.recv(100) == b"STOPPING=1"


def test_where_nobody_listens_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tell_service_manager("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    tell_service_manager("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [("", "", None), ("0", "", None), ("x", "", None), ("60000000", "", 60.0), ("60000000", "1", None)],
)
def test_the_watchdog_is_that_of_this_process(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, seconds: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    assert watchdog_seconds() == seconds


async def test_life_is_told_for_as_long_as_the_loop_runs(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    living = asyncio.create_task(stay_alive())
    told = [await asyncio.to_thread(listening.recv, 100) for _ in range(3)]
    living.cancel()
    assert told == [b"WATCHDOG=1"] * 3


async def test_where_nobody_waits_for_it_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    await stay_alive()
