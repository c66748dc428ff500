"""What the manager keeps running beside it is started again, and whoever has to know is told; one serves at a time, and none
is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest

from atelier.host import processes
from atelier.lifecycle.fleet import SandboxFleet
from atelier.manager import kept_process
from atelier.manager.installation import _close_run_folders
from atelier.manager.kept_process import KeptProcess, OwnProcess
from atelier.model.errors import HostError
from atelier.model.layout import RunLayout
from atelier.model.machine import ProcessIdentity

PROGRAM = """
import fcntl, json, os, socketserver, sys, time
import atelier

class Ping(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        answer = {"ok": True, "pid": os.getpid(), "version": atelier.__version__}
        self.wfile.write(json.dumps(answer).encode() + b"\\n")

lock = open(sys.argv[1] + ".lock", "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("another one serves")
lock.write("held")
lock.flush()
while os.path.exists(sys.argv[1] + ".wait"):
    time.sleep(0.01)
if os.path.exists(sys.argv[1]):
    os.unlink(sys.argv[1])
socketserver.UnixStreamServer(sys.argv[1], Ping).serve_forever()
"""


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


async def until_answered(kept: KeptProcess) -> None:
    async with asyncio.timeout(60):
        while await kept._ping() is None:
            pass


class Companion(KeptProcess):
    """``PROGRAM`` as a companion. It does not answer while ``wait_file`` exists."""

    def __init__(self, folder: Path, service: str = "") -> None:
        socket_path = folder / "control.sock"
        self.wait_file = folder / "control.sock.wait"
        self.log = folder / "log"
        self.arguments = ["-c", PROGRAM, str(socket_path)]
        starter = OwnProcess("companion", self.arguments, self.log)
        super().__init__("companion", "companion_failed", starter, socket_path, self.log, service)

    def find(self) -> list[ProcessIdentity]:
        return processes.find_processes(Path(sys.executable).resolve().name, self.arguments)


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Companion]:
    companion = Companion(tmp_path)
    yield companion
    await companion.close()
    assert companion.find() == []


async def test_who_has_to_know_is_told_of_each_new_one(kept: Companion) -> None:
    told: list[int] = []
    kept.on_started_anew = lambda: told.append(1)
    await kept.open()
    first = await kept._ping()
    assert first is not None
    assert told == [], "the first one is what its holder has asked for"
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: bool(told))
    second = await kept._ping()
    assert second is not None
    assert second.pid != first.pid
    assert told == [1]
    await kept.close()
    assert await kept._ping() is None


async def test_one_that_a_dead_manager_had_begun_to_start_is_waited_for(kept: Companion) -> None:
    kept.wait_file.touch()
    earlier = await processes.start_detached([sys.executable, *kept.arguments], stderr_path=kept.log)
    lock = kept.log.with_name("control.sock.lock")
    await until(lambda: lock.exists() and lock.read_text() == "held")
    opening = asyncio.create_task(kept.open())
    await until(lambda: "another one serves" in kept.log.read_text() and kept.find() == [earlier])
    await asyncio.sleep(0.2)
    assert not opening.done()
    kept.wait_file.unlink()
    await opening
    assert kept.find() == [earlier]


async def test_one_that_is_too_busy_to_answer_is_not_followed_by_another(kept: Companion) -> None:
    await kept.open()
    (first,) = kept.find()
    os.kill(first.pid, signal.SIGSTOP)
    await until(lambda: "another one serves" in kept.log.read_text())
    os.kill(first.pid, signal.SIGCONT)
    await until_answered(kept)
    await kept.release()
    await until(lambda: kept.find() == [first])


async def test_a_start_that_is_broken_off_leaves_nothing(kept: Companion) -> None:
    kept.wait_file.touch()
    opening = asyncio.create_task(kept.open())
    await until(lambda: bool(kept.find()))
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert kept.find() == []


async def test_one_that_hangs_is_ended_too(kept: Companion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_process, "_STOP_SECONDS", 0.5)
    await kept.open()
    (first,) = kept.find()
    os.kill(first.pid, signal.SIGSTOP)
    await kept.close()
    assert kept.find() == []


async def _start_elsewhere(companion: Companion) -> ProcessIdentity:
    return await processes.start_detached([sys.executable, *companion.arguments], stderr_path=companion.log)


async def test_a_service_is_waited_for_and_never_started_or_ended(tmp_path: Path) -> None:
    service = Companion(tmp_path, "atelier-companion")
    told: list[int] = []
    service.on_started_anew = lambda: told.append(1)
    opening = asyncio.create_task(service.open())
    await asyncio.sleep(0.3)
    assert not opening.done()
    assert service.find() == []
    first = await _start_elsewhere(service)
    try:
        await opening
        assert told == []
        await processes.kill_and_wait(first)
        await asyncio.sleep(1.5)
        assert service.find() == [], "it is not this manager's to start"
        second = await _start_elsewhere(service)
        await until(lambda: bool(told))
        await service.close()
        assert service.find() == [second]
        await processes.kill_and_wait(second)
    finally:
        for left in service.find():
            await processes.kill_and_wait(left)


async def test_a_service_that_was_only_busy_is_not_told_as_a_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Companion(tmp_path, "atelier-companion")
    told: list[int] = []
    service.on_started_anew = lambda: told.append(1)
    running = await _start_elsewhere(service)
    try:
        await service.open()
        os.kill(running.pid, signal.SIGSTOP)
        await until(lambda: "does not answer" in caplog.text)
        os.kill(running.pid, signal.SIGCONT)
        with caplog.at_level("INFO"):
            await until(lambda: "answers again" in caplog.text)
        assert told == []
        await service.close()
    finally:
        await processes.kill_and_wait(running)


async def test_a_service_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_process, "_START_SECONDS", 0.3)
    with pytest.raises(HostError, match=r"companion \(atelier-companion\) does not answer") as refused:
        await Companion(tmp_path, "atelier-companion").open()
    assert refused.value.code == "companion_failed"
    assert "systemctl restart atelier-companion" in refused.value.hint


async def test_a_service_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Companion(tmp_path, "atelier-companion")
    identity = await _start_elsewhere(service)
    try:
        await until_answered(service)
        monkeypatch.setattr(kept_process.atelier, "__version__", "99.0")
        with pytest.raises(HostError, match=r"this manager of 99\.0"):
            await service.open()
        assert service.find() == [identity]
    finally:
        await processes.kill_and_wait(identity)


class _NothingRuns:
    def list_running_names(self) -> list[str]:
        return []


@pytest.mark.parametrize("service", ["", "atelier-companion"])
async def test_a_managers_end_leaves_the_sockets_of_services(tmp_path: Path, service: str) -> None:
    run = RunLayout(tmp_path / "run")
    for folder in (run.sandboxes, run.channels):
        folder.mkdir(parents=True)
    for file in (run.gateway_socket, run.network_socket, run.network_lock):
        file.touch()
    await _close_run_folders(run, cast("SandboxFleet", _NothingRuns()), [Companion(tmp_path, service)])
    assert run.network_socket.exists() is bool(service)
    assert run.root.exists() is bool(service)
