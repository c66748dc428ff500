"""Keeps a gateway running beside the manager.

The gateway lives in a process (and session) of its own, so that a manager that dies takes no channel with it; the next
manager finds it by its control socket and uses it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import atelier
from atelier.host import processes
from atelier.model.errors import AtelierError, HostError

logger = logging.getLogger(__name__)

_START_SECONDS = 20.0
_STOP_SECONDS = 10.0
_CHECK_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Answer:
    pid: int
    version: str


class GatewayProcess:
    """``socket_path``: the gateway's control socket; ``log_path``: where its log goes."""

    def __init__(self, run_dir: Path, socket_path: Path, log_path: Path) -> None:
        self._run_dir = run_dir
        self._socket_path = socket_path
        self._log_path = log_path
        self._supervisor: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start a gateway unless one of this version answers already, and keep one running. An older one is replaced:
        guests' processes live on, clients connect again. Raises HostError if it does not start."""
        answer = await self._ping()
        if answer is not None and answer.version != atelier.__version__:
            logger.info("replacing the gateway of version %s", answer.version or "unknown")
            await self._end(answer.pid)
            answer = None
        if answer is None:
            await self._start()
        self._supervisor = asyncio.create_task(self._supervise())

    async def release(self) -> None:
        """Watch it no longer and leave it to the next manager: machines go on that need it."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)

    async def close(self) -> None:
        """End the gateway: to be called when no sandbox is left that needs it."""
        await self.release()
        if (answer := await self._ping()) is not None:
            await self._end(answer.pid)

    async def _end(self, pid: int) -> None:
        if (identity := processes.find_identity(pid)) is not None:
            await processes.kill_and_wait(identity, _STOP_SECONDS, signal_number=signal.SIGTERM)

    async def _start(self) -> None:
        arguments = [sys.executable, "-m", "atelier.gateway", "--run-dir", str(self._run_dir)]
        identity = await processes.start_detached(arguments, stderr_path=self._log_path)
        try:
            async with asyncio.timeout(_START_SECONDS):
                while await self._ping() is None:
                    if not processes.is_alive(identity):
                        raise HostError(
                            "the gateway ended as soon as it was started",
                            code="gateway_failed",
                            hint=f"its log is {self._log_path}",
                        )
                    await asyncio.sleep(0.02)
        except TimeoutError as error:
            raise HostError(
                f"the gateway does not answer within {_START_SECONDS:g} s",
                code="gateway_failed",
                hint=f"its log is {self._log_path}",
            ) from error

    async def _supervise(self) -> None:
        backoff = _CHECK_SECONDS
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if await self._ping() is not None:
                backoff = _CHECK_SECONDS
                continue
            logger.warning("the gateway does not answer: starting it again")
            try:
                await self._start()
            except AtelierError as error:
                logger.error("%s", error)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)

    async def _ping(self) -> _Answer | None:
        """What the gateway says of itself; None if none answers."""
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_unix_connection(self._socket_path)
                try:
                    writer.write(b'{"operation": "ping"}\n')
                    answer = json.loads(await reader.readline())
                    return _Answer(int(answer["pid"]), str(answer.get("version", ""))) if answer.get("ok") else None
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except (OSError, ValueError, TimeoutError, KeyError):
            return None
