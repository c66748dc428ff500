"""Guest agents behind a stand-in for the gateway: a control socket that takes attach and detach, and one unix socket
per sandbox that answers ``CONNECT 49983``. The agents are processes of this host, listening on unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent_fixture import SOURCE

_START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from atelier.guest_agent.__main__ import main
sys.exit(main())
"""


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(256 * 1024):
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


class GuestBridge:
    """``folder`` holds ``gateway.sock`` and the channels' sockets. An attach's ``socket_path`` is the agent's socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self._channels: dict[str, asyncio.Server] = {}
        self._control: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def gateway_socket(self) -> Path:
        return self.folder / "gateway.sock"

    def channel_socket(self, sandbox_id: str) -> Path:
        return self.folder / f"{sandbox_id}.sock"

    async def open(self) -> None:
        self._control = await asyncio.start_unix_server(self._serve_control, str(self.gateway_socket))

    async def close(self) -> None:
        for server in (*self._channels.values(), self._control):
            if server is not None:
                server.close()
        self.cut()

    def cut(self) -> None:
        """Every stream of every channel breaks."""
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            self.requests.append(request)
            writer.write(json.dumps(await self._answer(request)).encode() + b"\n")
        writer.close()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        sandbox_id = request.get("sandbox_id", "")
        if request["operation"] == "detach":
            server = self._channels.pop(sandbox_id, None)
            if server is not None:
                server.close()
                self.channel_socket(sandbox_id).unlink(missing_ok=True)
            return {"ok": True}
        if request["operation"] == "list":
            return {"ok": True, "channels": [{"sandbox_id": attached} for attached in self._channels]}
        if not Path(request["socket_path"]).exists():
            return {"ok": False, "code": "no_such_socket", "message": "there is no such socket"}
        if sandbox_id not in self._channels:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self._serve_channel(reader, writer, request["socket_path"])

            self._channels[sandbox_id] = await asyncio.start_unix_server(serve, str(self.channel_socket(sandbox_id)))
        return {"ok": True}

    async def _serve_channel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, agent: str) -> None:
        self.connections += 1
        assert await reader.readline() == b"CONNECT 49983\n"
        try:
            guest_reader, guest_writer = await asyncio.open_unix_connection(agent)
        except OSError:
            writer.write(b"ERROR unreachable\n")
            writer.close()
            return
        writer.write(b"OK 7\n")
        ends = {writer, guest_writer}
        self._open |= ends
        there = asyncio.create_task(copy(reader, guest_writer))
        await copy(guest_reader, writer)
        # The agent closed this stream: nothing more can be asked on it.
        writer.close()
        guest_writer.close()
        await there
        self._open -= ends


class AgentProcess:
    """A guest agent that can be killed and started again under the same socket."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *options: str) -> None:
        self.socket_path.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", _START, str(SOURCE),
            "--listen", f"unix:{self.socket_path}", "--no-system", "--development", "--default-user", "root", *options,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert (await self._process.stdout.readline()).startswith(b"listening on unix:")

    async def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None


@asynccontextmanager
async def bridged_agent(folder: Path) -> AsyncIterator[tuple[GuestBridge, AgentProcess]]:
    bridge, agent = GuestBridge(folder), AgentProcess(folder / "agent.sock")
    await bridge.open()
    await agent.start()
    try:
        yield bridge, agent
    finally:
        await agent.kill()
        await bridge.close()
