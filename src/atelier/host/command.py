"""Runs other programs. Argument lists only; a failure shows a line that can be pasted into a shell.

Called by drivers and programs. Long-lived detached processes are ``host.processes``' business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atelier.model.errors import CommandError, MissingProgramError, TimeoutExceededError

_STDERR_TAIL_BYTES = 4000


@dataclass(frozen=True, slots=True)
class CommandResult:
    stdout: bytes
    stderr: bytes


def show(arguments: Sequence[str]) -> str:
    """The command as one line that a shell takes."""
    return shlex.join(arguments)


async def run(
    arguments: Sequence[str],
    *,
    timeout_seconds: float = 60.0,
    input_bytes: bytes | None = None,
    standard_input: int = asyncio.subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    pass_descriptors: Sequence[int] = (),
    on_output: Callable[[str], None] | None = None,
    package_hint: str = "",
) -> CommandResult:
    """Run a program to its end and return what it wrote.

    ``input_bytes`` are what it reads, else ``standard_input`` (a descriptor). ``environment`` adds to this process's own.
    ``pass_descriptors`` keep their numbers. ``on_output`` receives each line of stdout and stderr as it comes
    (for progress). ``package_hint`` names the Debian package that brings the program.

    Raises MissingProgramError, TimeoutExceededError (the whole process group is killed, as on cancellation),
    CommandError with the end of stderr for any exit status but 0.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE if input_bytes is not None else standard_input,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=directory,
            env={**os.environ, **environment} if environment else None,
            start_new_session=True,
            pass_fds=tuple(pass_descriptors),
        )
    except FileNotFoundError as error:
        if directory is not None and not directory.is_dir():
            raise CommandError(f"cannot run {show(arguments)}: no folder {directory}") from error
        raise MissingProgramError(
            f"{arguments[0]} is not installed",
            hint=f"apt-get install {package_hint}" if package_hint else f"install {arguments[0]}",
        ) from error

    async def collect(stream: asyncio.StreamReader | None) -> bytes:
        assert stream is not None
        chunks: list[bytes] = []
        partial = b""
        while chunk := await stream.read(65536):
            chunks.append(chunk)
            if on_output is not None:
                *lines, partial = (partial + chunk).replace(b"\r", b"\n").split(b"\n")
                for line in lines:
                    if line.strip():
                        on_output(line.decode(errors="replace"))
        return b"".join(chunks)

    async def feed() -> None:
        if input_bytes is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(input_bytes)
            await process.stdin.drain()
        process.stdin.close()

    try:
        async with asyncio.timeout(timeout_seconds):
            stdout, stderr, _ = await asyncio.gather(collect(process.stdout), collect(process.stderr), feed())
            status = await process.wait()
    except TimeoutError as error:
        raise TimeoutExceededError(f"{show(arguments)} did not end within {timeout_seconds:g} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    if status != 0:
        tail = stderr[-_STDERR_TAIL_BYTES:].decode(errors="replace").strip()
        reason = f"signal {-status}" if status < 0 else f"exit status {status}"
        raise CommandError(f"{show(arguments)}: {reason}: {tail}")
    return CommandResult(stdout, stderr)
