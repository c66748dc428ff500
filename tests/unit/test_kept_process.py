"""What the manager keeps running beside it is started again, and whoever has to know is told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

from atelier.manager.kept_process import KeptProcess

PROGRAM = """
import json, os, socketserver, sys
import atelier

class Ping(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        answer = {"ok": True, "pid": os.getpid(), "version": atelier.__version__}
        self.wfile.write(json.dumps(answer).encode() + b"\\n")

if os.path.exists(sys.argv[1]):
    os.unlink(sys.argv[1])
socketserver.UnixStreamServer(sys.argv[1], Ping).serve_forever()
"""


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


async def test_who_has_to_know_is_told_of_each_new_one(tmp_path: Path) -> None:
    socket_path = tmp_path / "control.sock"
    kept = KeptProcess(
        "companion", "companion_failed", ["-c", PROGRAM, str(socket_path)], socket_path, tmp_path / "log"
    )
    told: list[int] = []

    def remember() -> None:
        told.append(1)

    kept.on_started_anew = remember
    await kept.open()
    try:
        first = await kept._ping()
        assert first is not None
        assert told == [], "the first one is what its holder has asked for"
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: bool(told))
        second = await kept._ping()
        assert second is not None
        assert second.pid != first.pid
        assert told == [1]
    finally:
        await kept.close()
    assert await kept._ping() is None
