"""Programs of ours in processes of their own that did not have to import anything: each is forked from a server that has
imported all of it and done nothing yet.

What is forked has its own pid, environment, descriptors 0 to 2, signals and exit status, as from ``python -m``; what it
has not is a command line of its own. A test for which the interpreter's start is the point executes the program anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, Protocol

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "atelier.cli.__main__",
        "atelier.manager.__main__",
        "alembic.command",
        "atelier.drivers.storage.qcow2",
        "atelier.gateway.__main__",
        "atelier.network_holder.__main__",
        "tests.contract.crashing_holder",
        "tests.contract.crashing_managers",
        "tests.lifecycle.crash_program",
        "tests.lifecycle.sabotage",
    ]
)


class Program(Protocol):
    """What ``subprocess.Popen`` and ``ForkedProgram`` have in common."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


class ForkedProgram:
    """``python -m words[0] words[1] ...``, begun at once in ``folder``, with an empty stdin. It ends with this process, if
    it has not ended before."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        output: IO[bytes],
        errors: IO[bytes],
    ) -> None:
        streams = [_Descriptor(each.fileno()) for each in (output, errors)]
        self._process = PROCESSES.Process(
            target=_execute, args=(list(words), dict(environment), folder, streams), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal's number; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(
    words: Sequence[str], *, environment: Mapping[str, str], folder: Path, timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run a ``ForkedProgram`` to its end; what it said."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        program = ForkedProgram(words, environment=environment, folder=folder, output=output, errors=errors)
        try:
            status = program.wait(timeout)
        finally:
            program.kill()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, status, output.read(), errors.read())


class _Descriptor:
    """One of this process, which arrives in the forked one as a number of its own."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (DupFd(self._number),)


def _receive(handed: Any) -> int:
    return handed.detach()


def _execute(words: list[str], environment: dict[str, str], folder: Path, streams: list[int]) -> None:
    """In the forked process; ends by ``SystemExit``, which becomes its exit status."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    run_module(*words)


def run_module(module: str, *arguments: str) -> None:
    """As ``python -m`` does, in this process."""
    sys.argv = [module, *arguments]
    program = f"{module}.__main__"
    sys.modules.pop(program if program in sys.modules else module, None)  # else runpy warns of it
    runpy.run_module(module, run_name="__main__", alter_sys=True)
