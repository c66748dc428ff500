"""The gateway as a process of its own, for tests: started and ended at will, and asked over its control socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from atelier.model.layout import RunLayout

SANDBOX = "abcdefghij23"
PATIENCE_SECONDS = 30.0
"""Nothing here takes that long; a loaded machine may."""
PROGRAM = ("-m", "atelier.gateway")


class Gateway:
    """``python -m atelier.gateway`` on a run directory of its own."""

    def __init__(self, root: Path) -> None:
        self.layout = RunLayout(root)
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, *arguments: str, program: Sequence[str] = PROGRAM) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *program, "--run-dir", str(self.layout.root), *arguments
        )
        await until(self.layout.gateway_socket.exists)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), PATIENCE_SECONDS)

    async def ask(self, **request: object) -> dict:
        return (await self.ask_raw(json.dumps(request).encode() + b"\n"))[0]

    async def ask_raw(self, lines: bytes) -> list[dict]:
        reader, writer = await asyncio.open_unix_connection(str(self.layout.gateway_socket))
        writer.write(lines)
        writer.write_eof()
        answers = [json.loads(line) async for line in reader]
        writer.close()
        return answers

    async def attach(self, vmm_socket: Path, sandbox_id: str = SANDBOX, token: str = "token") -> None:
        answer = await self.ask(operation="attach", sandbox_id=sandbox_id, socket_path=str(vmm_socket), token=token)
        assert answer["ok"], answer

    async def channel(self, sandbox_id: str = SANDBOX) -> dict:
        channels = (await self.ask(operation="list"))["channels"]
        return next(channel for channel in channels if channel["sandbox_id"] == sandbox_id)

    async def connect(self, port: int, sandbox_id: str = SANDBOX) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer, answer = await self.try_connect(port, sandbox_id)
        assert answer.startswith(b"OK "), answer
        return reader, writer

    async def try_connect(
        self, port: int | str, sandbox_id: str = SANDBOX
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        reader, writer = await asyncio.open_unix_connection(str(self.layout.channel_socket(sandbox_id)))
        writer.write(f"CONNECT {port}\n".encode())
        return reader, writer, await asyncio.wait_for(reader.readline(), PATIENCE_SECONDS)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not holds():
            await asyncio.sleep(0.01)
