"""The one door to root: typed requests to ``atelier-privileged``, which sudo starts once for each group of verbs.

Called by the drivers of a production host. A program of root's answers each line of JSON with one; it checks every
argument itself and trusts nothing of what this side says. Who is root already starts the same program without sudo.

When sudo refuses, the error names the entry that is missing and the command that mends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import logging
import os
from pathlib import Path
from typing import Any, Literal, cast

from atelier.host.command import show
from atelier.model.errors import (
    AtelierError,
    CommandError,
    ConflictError,
    DiskFullError,
    HostError,
    InvalidRequestError,
    MissingProgramError,
    NotFoundError,
)

Group = Literal["storage", "vmm"]
GROUPS: tuple[Group, ...] = ("storage", "vmm")
PROGRAM = Path("/usr/local/sbin/atelier-privileged")
PROTOCOL_VERSION = 1
LINE_MAX_BYTES = 4 * 1024 * 1024

_START_SECONDS = 120.0
_END_SECONDS = 30.0
_STDERR_TAIL_BYTES = 2000
_KINDS: dict[str, type[AtelierError]] = {
    kind.__name__: kind
    for kind in (
        CommandError,
        ConflictError,
        DiskFullError,
        HostError,
        InvalidRequestError,
        MissingProgramError,
        NotFoundError,
    )
}

_logger = logging.getLogger(__name__)


def sudoers_entry(user: str, program: Path, group: str) -> str:
    """The line without which ``group`` is refused. The argument is stated exactly: nothing may stand beside it."""
    return f"{user} ALL=(root:root) NOPASSWD: {program} {group}"


class Privileges:
    """One group of verbs. ``use_sudo`` None: unless this process is root."""

    def __init__(self, group: Group, *, program: Path = PROGRAM, use_sudo: bool | None = None) -> None:
        self._group: Group = group
        self._program = program
        self._use_sudo = os.geteuid() != 0 if use_sudo is None else use_sudo
        self._process: asyncio.subprocess.Process | None = None
        self._last_words = bytearray()
        self._listening: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def ask(self, verb: str, **fields: object) -> dict[str, Any]:
        """The answer's fields. One request is under way at a time; a program that has ended is started anew first.

        Raises what root's side raises, HostError: ``privilege_missing`` (sudo refuses), ``privilege_lost`` (the program
        ended before it answered: what was asked for may be done or not).
        """
        asking = asyncio.ensure_future(self._ask_in_turn({"verb": verb, **fields}))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            # The answer must not be taken for the next request's.
            await asyncio.wait([asking])
            if not asking.cancelled():
                asking.exception()
            raise

    async def close(self) -> None:
        """End the program when it has done what it does."""
        async with self._turn:
            await self._end()

    async def _ask_in_turn(self, request: dict[str, object]) -> dict[str, Any]:
        async with self._turn:
            if self._process is None or self._process.returncode is not None:
                await self._end()
                await self._start()
            answer = await self._exchange(request)
        if "error" in answer:
            error = cast("dict[str, str]", answer["error"])
            kind = _KINDS.get(str(error.get("kind")), HostError)
            raise kind(str(error.get("message")), code=str(error.get("code", "")), hint=str(error.get("hint", "")))
        return answer

    async def _start(self) -> None:
        words = [*(("sudo", "-n", "--") if self._use_sudo else ()), str(self._program), self._group]
        self._last_words.clear()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=LINE_MAX_BYTES,
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
                if not self._use_sudo
                else None,
                # A signal to this process's group must not end root's work in the middle.
                start_new_session=True,
            )
        except (FileNotFoundError, PermissionError) as error:
            hint = "apt-get install sudo" if self._use_sudo else "as root: atelier host init"
            raise MissingProgramError(f"{words[0]} cannot be run: {error.strerror}", hint=hint) from error
        self._listening = asyncio.create_task(self._listen(self._process))
        try:
            async with asyncio.timeout(_START_SECONDS):
                hello = await self._read_line()
        except TimeoutError:
            await self._end()
            raise HostError(f"{show(words)} says nothing", code="privilege_lost") from None
        if hello is None:
            await self._refuse(words)
        elif hello.get("protocol") != PROTOCOL_VERSION:
            await self._end()
            raise HostError(
                f"{self._program} is of another version of Atelier",
                code="privilege_outdated",
                hint="as root: atelier host update",
            )

    async def _refuse(self, words: list[str]) -> None:
        """It ended without a greeting: sudo's refusal, or the program's own last words."""
        assert self._process is not None
        status = await self._process.wait()
        if self._listening is not None:
            await self._listening
        said = self._last_words.decode(errors="replace").strip()
        await self._end()
        if not self._use_sudo or "atelier-privileged:" in said:
            raise HostError(f"{show(words)} ended with status {status}: {said}", code="privilege_lost")
        if "no new privileges" in said:
            raise HostError(
                f"sudo may not become root here: {said}",
                code="privilege_missing",
                hint="nothing that implies NoNewPrivileges may stand in the manager's unit: atelier host systemd",
            )
        entry = sudoers_entry(getpass.getuser(), self._program, self._group)
        raise HostError(
            f"sudo refuses what Atelier needs root for ({self._group}). This entry is missing in sudoers: "
            f"{entry}. It said: {said or f'status {status}'}",
            code="privilege_missing",
            hint="as root: atelier host init, which writes /etc/sudoers.d/atelier; sudo -l shows what there is",
        )

    async def _exchange(self, request: dict[str, object]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        answer: dict[str, Any] | None = None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
            answer = await self._read_line()
        if answer is None:
            status = await self._process.wait()
            said = self._last_words.decode(errors="replace").strip()
            await self._end()
            raise HostError(
                f"{self._program} {self._group} ended with status {status} while it was asked to {request['verb']}: {said}",
                code="privilege_lost",
                hint="try again",
            )
        return answer

    async def _read_line(self) -> dict[str, Any] | None:
        """None when the program has ended."""
        assert self._process is not None and self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            return cast("dict[str, Any]", json.loads(line)) if line.endswith(b"\n") else None
        except ValueError:
            await self._end()
            raise HostError(f"{self._program} {self._group} answered nonsense", code="privilege_lost") from None

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while chunk := await process.stderr.read(4096):
            self._last_words += chunk
            del self._last_words[:-_STDERR_TAIL_BYTES]
            for line in chunk.decode(errors="replace").splitlines():
                _logger.warning("%s %s: %s", self._program.name, self._group, line)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            # Root's process cannot be killed from here: it ends when it has read that nobody asks any more.
            _logger.warning("%s %s does not end", self._program, self._group)
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None
