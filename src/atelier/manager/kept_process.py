"""Keeps one of the manager's companions running beside it: the gateway, the network holder.

Each lives in a process (and session) of its own, so that a manager that dies takes nothing with it; the next manager
finds it by its control socket, where it answers the operation ``ping``, and uses it on. On a production host the service
manager starts and ends them: there they are only waited for and watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import atelier
from atelier.host import processes
from atelier.host.files import read_tail
from atelier.model.errors import AtelierError, HostError, TimeoutExceededError
from atelier.model.machine import ProcessIdentity

logger = logging.getLogger(__name__)

_START_SECONDS = 20.0
_STOP_SECONDS = 10.0
_CHECK_SECONDS = 1.0
_SERVICE_POLL_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 10.0
_LAST_WORDS_BYTES = 2000


@dataclass(frozen=True, slots=True)
class _Answer:
    pid: int
    version: str
    problems: tuple[str, ...] = ()
    """What a person has to mend, in words."""


class Starter(Protocol):
    """Starts and ends a companion: as a process of the manager's own user, or by way of root."""

    async def start(self) -> ProcessIdentity: ...

    async def end(self, identity: ProcessIdentity) -> None:
        """Return when it is proved dead; one that does not end in order is killed."""
        ...

    async def is_there(self) -> bool:
        """Whether one runs, whoever started it."""
        ...


class OwnProcess:
    """``arguments`` are those of this Python, ``log_path`` is where its log goes."""

    def __init__(self, title: str, arguments: Sequence[str], log_path: Path) -> None:
        self._title = title
        self._arguments = arguments
        self._log_path = log_path

    async def start(self) -> ProcessIdentity:
        return await processes.start_detached([sys.executable, *self._arguments], stderr_path=self._log_path)

    async def end(self, identity: ProcessIdentity) -> None:
        try:
            await processes.kill_and_wait(identity, _STOP_SECONDS, signal_number=signal.SIGTERM)
        except TimeoutExceededError:
            logger.warning("the %s does not end within %g s: it is killed", self._title, _STOP_SECONDS)
            await processes.kill_and_wait(identity)

    async def is_there(self) -> bool:
        program = Path(sys.executable).resolve().name
        return bool(await asyncio.to_thread(processes.find_processes, program, self._arguments))


class KeptProcess:
    """``title`` is what messages call it, ``code`` that of the error when it does not start; ``socket_path`` is its
    control socket, ``log_path`` where its log goes. ``service``: the host's service that it is, where it is not this
    manager's to start and to end; else empty."""

    def __init__(
        self, title: str, code: str, starter: Starter, socket_path: Path, log_path: Path, service: str = ""
    ) -> None:
        self._service = service
        self._title = title
        self._code = code
        self._starter = starter
        self._socket_path = socket_path
        self._log_path = log_path
        self.on_started_anew: Callable[[], None] = lambda: None
        """Called after it had ended, or hung, and was started again."""
        self._supervisor: asyncio.Task[None] | None = None
        self._last: ProcessIdentity | None = None
        """The one that answered last: it is there, though it may be too busy to answer."""
        self._told: frozenset[str] = frozenset()

    @property
    def is_service(self) -> bool:
        """Whether it goes on when the manager ends, whatever becomes of the sandboxes."""
        return bool(self._service)

    async def open(self) -> None:
        """Start it unless one of this version answers already, and keep one running. One of another version is replaced.
        Raises HostError if it does not start."""
        if self._service:
            await self._wait_for_service()
            self._supervisor = asyncio.create_task(self._watch_service())
            return
        answer = await self._ping()
        if answer is not None and answer.version != atelier.__version__:
            logger.info("replacing the %s of version %s", self._title, answer.version or "unknown")
            await self._end()
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
        """End it, unless it is a service: to be called when no sandbox is left that needs it. Raises TimeoutExceededError."""
        await self.release()
        if self._service:
            return
        await self._ping()
        await self._end()

    async def _end(self) -> None:
        if self._last is not None:
            await self._starter.end(self._last)

    async def _wait_for_service(self) -> None:
        """Raises HostError when it does not answer in time, or is of another version than this manager."""
        hint = f"systemctl restart {self._service}; its log: journalctl -u {self._service}"
        try:
            async with asyncio.timeout(_START_SECONDS):
                while (answer := await self._ping()) is None:  # noqa: ASYNC110  only asking tells
                    await asyncio.sleep(_SERVICE_POLL_SECONDS)
        except TimeoutError as error:
            raise HostError(
                f"the {self._title} ({self._service}) does not answer within {_START_SECONDS:g} s",
                code=self._code,
                hint=hint,
            ) from error
        if answer.version != atelier.__version__:
            raise HostError(
                f"the {self._title} ({self._service}) is of version {answer.version or 'unknown'}, "
                f"this manager of {atelier.__version__}",
                code=self._code,
                hint=hint,
            )

    async def _watch_service(self) -> None:
        """Say when it is gone, and let go on what waits for it when one that was started anew answers."""
        was_gone = False
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            before = self._last
            answer = await self._ping()
            if answer is None:
                if not was_gone:
                    logger.warning("the %s (%s) does not answer", self._title, self._service)
                was_gone = True
                continue
            self._tell(answer.problems)
            if self._last != before:
                logger.info("the %s (%s) was started anew", self._title, self._service)
                self.on_started_anew()
            elif was_gone:
                logger.info("the %s (%s) answers again", self._title, self._service)
            was_gone = False

    async def _start(self) -> None:
        identity = await self._starter.start()
        serves = False
        try:
            await self._wait_for_answer(identity)
            serves = self._last == identity
        finally:
            if not serves:
                # Another one does, or nobody waits for it any more: it would come up behind everybody's back.
                await self._starter.end(identity)

    async def _wait_for_answer(self, identity: ProcessIdentity) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                while await self._ping() is None:
                    # Another that somebody else started, as a manager that died since, answers soon.
                    if not processes.is_alive(identity) and not await self._starter.is_there():
                        raise HostError(
                            f"the {self._title} ended as soon as it was started: {self._last_words()}",
                            code=self._code,
                            hint=f"its log is {self._log_path}",
                        )
                    await asyncio.sleep(0.02)
        except TimeoutError as error:
            raise HostError(
                f"the {self._title} does not answer within {_START_SECONDS:g} s",
                code=self._code,
                hint=f"its log is {self._log_path}",
            ) from error

    async def _supervise(self) -> None:
        backoff = _CHECK_SECONDS
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if (answer := await self._ping()) is not None:
                backoff = _CHECK_SECONDS
                self._tell(answer.problems)
                continue
            logger.warning("the %s does not answer: starting it again", self._title)
            try:
                await self._start()
                self.on_started_anew()
            except AtelierError as error:
                logger.error("%s", error)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)

    def _tell(self, problems: tuple[str, ...]) -> None:
        for problem in problems:
            if problem not in self._told:
                logger.warning("%s: %s", self._title, problem)
        self._told = frozenset(problems)

    def _last_words(self) -> str:
        lines = read_tail(self._log_path, _LAST_WORDS_BYTES).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word"

    async def _ping(self) -> _Answer | None:
        """What it says of itself; None if none answers."""
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_unix_connection(self._socket_path)
                try:
                    writer.write(b'{"operation": "ping"}\n')
                    answer = json.loads(await reader.readline())
                    if not answer.get("ok"):
                        return None
                    problems = tuple(str(each) for each in answer.get("problems", ()))
                    found = _Answer(int(answer["pid"]), str(answer.get("version", "")), problems)
                    self._last = processes.find_identity(found.pid)
                    return found
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except (OSError, ValueError, TimeoutError, KeyError):
            return None
