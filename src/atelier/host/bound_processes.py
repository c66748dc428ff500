"""Programs that end with the process that started them, however it ends: killed without warning too.

Called by programs that must leave nothing running. ``prctl(PR_SET_PDEATHSIG)`` did not end ``pasta`` (it is lost where a
program changes its own credentials); the end of a pipe is lost by nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from atelier.host.command import show
from atelier.model.errors import CommandError

_STDERR_TAIL_BYTES = 2000
# Tells the program's pid, then waits for it; beside it a shell waits for the pipe's end. Both have to end with the first.
_GUARD = """
exec 3<&0
"$@" </dev/null 3<&- >&2 & program=$!
{ read -r _ <&3; kill -KILL "$program"; } 2>/dev/null & guard=$!
exec 3<&-
echo "$program"
exec >&-
wait "$program"; status=$?
kill "$guard" 2>/dev/null
exit "$status"
"""


@dataclass(slots=True)
class BoundProcess:
    """``pid`` is the program's; ``words`` the end of what it said."""

    pid: int
    command: str
    _guard: asyncio.subprocess.Process
    words: str = ""

    async def wait(self) -> int:
        """Until it has ended by itself or by another; its exit status. The pipes are read meanwhile."""
        stderr = self._guard.stderr
        assert stderr is not None
        while chunk := await stderr.read(65536):
            self.words = (self.words + chunk.decode(errors="replace"))[-_STDERR_TAIL_BYTES:]
        return await self._guard.wait()

    async def end(self) -> None:
        """Kill it, and return when it is gone. Idempotent."""
        if self._guard.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        await self._guard.wait()


async def start_bound(arguments: Sequence[str]) -> BoundProcess:
    """Start a program bound to this process. It need not have been executed yet when this returns.

    Raises CommandError when no shell could start it.
    """
    guard = await asyncio.create_subprocess_exec(
        *("sh", "-c", _GUARD, "sh", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdout is not None
    line = (await guard.stdout.readline()).strip()
    if not line.isdigit():
        raise CommandError(f"{show(arguments)} could not be started")
    return BoundProcess(int(line), show(arguments), guard)
