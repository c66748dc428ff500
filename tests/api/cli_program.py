"""Drives the real ``atelier`` program: as a child process, and on a pseudo-terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner, Result
from tests.forked_programs import run_forked
from tests.running_manager import RunningManager

from atelier.cli.__main__ import cli

_QUICK = (
    "create",
    "get",
    "ls",
    "rm",
    "stop",
    "start",
    "restart",
    "resize",
    "retry",
    "extend",
    "cp",
    "logs",
    "image",
    "network",
    "version",
    "pause",
    "resume",
    "snapshot",
    "fork",
    "snapshots",
    "pool",
    "user",
    "key",
    "share",
    "audit",
    "terminals",
    "terminal-close",
)
PROGRAM = [sys.executable, "-m", "atelier.cli"]


@dataclass(frozen=True)
class Cli:
    """``atelier`` with the environment of a test's manager and nothing of the user's."""

    manager: RunningManager
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**self.manager.environment, "HOME": str(self.folder), "TERM": "xterm"}

    def run(
        self, *arguments: str | bytes | Path, input: bytes | None = None, status: int | None = 0, timeout: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        """Run to the end. ``input`` None: stdin is /dev/null. ``status`` None: any.

        Commands without input run inside of this process, which takes a tenth of the time, or forked where they may
        execute another program or want to hear of signals.
        """
        if input is not None:
            return self.run_program(*arguments, input=input, status=status, timeout=timeout)
        if arguments[0] in _QUICK:
            result = self.invoke(*map(str, arguments), status=status)
            return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout_bytes, result.stderr_bytes)
        words = ["atelier.cli", *map(os.fsdecode, arguments)]
        return self._checked(
            run_forked(words, environment=self.environment, folder=self.folder, timeout=timeout), status
        )

    def run_program(
        self, *arguments: str | bytes | Path, input: bytes | None = None, status: int | None = 0, timeout: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        """As ``run``, always as a program of its own."""
        done = subprocess.run(
            [*PROGRAM, *arguments],
            env=self.environment,
            cwd=self.folder,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout,
        )
        return self._checked(done, status)

    @staticmethod
    def _checked(done: subprocess.CompletedProcess[bytes], status: int | None) -> subprocess.CompletedProcess[bytes]:
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        assert status is None or done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    def invoke(self, *arguments: str, status: int | None) -> Result:
        """Run inside of this process; stdin is empty."""
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            result = CliRunner().invoke(cli, arguments, env=self.environment, prog_name="atelier")
        finally:
            os.chdir(here)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert status is None or result.exit_code == status, (result.exit_code, result.output)
        return result

    def start(self, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([*PROGRAM, *arguments], env=self.environment, cwd=self.folder, **streams)  # type: ignore[call-overload]

    def open_terminal(self, *arguments: str, columns: int = 80, rows: int = 24) -> TerminalSession:
        return TerminalSession([*PROGRAM, *arguments], self.environment, columns, rows)


class TerminalSession:
    """A program on a pseudo-terminal. ``before`` are the terminal's settings before the program touched them."""

    def __init__(self, arguments: list[str], environment: dict[str, str], columns: int, rows: int) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(columns, rows, tell=False)
        self.before = termios.tcgetattr(self.slave)
        self.output = b""
        self.process = subprocess.Popen(
            arguments, env=environment, stdin=self.slave, stdout=self.slave, stderr=self.slave,
            preexec_fn=self._own_terminal,
        )  # fmt: skip

    @staticmethod
    def _own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, columns: int, rows: int, *, tell: bool = True) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, pattern: bytes, timeout: float = 60) -> re.Match[bytes]:
        """Read until ``pattern`` appears in what was not matched yet."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self.output)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; so far: {self.output!r}"
            try:
                piece = os.read(self.master, 65536)
            except OSError:
                piece = b""
            assert piece, f"ended before {pattern!r}; so far: {self.output!r}"
            self.output += piece
        self.output = self.output[found.end() :]
        return found

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def wait_raw(self) -> None:
        deadline = time.monotonic() + 60
        while not self.is_raw():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output
            time.sleep(0.02)

    def wait(self, timeout: float = 60) -> int:
        """The exit status. Reads on meanwhile, so that the program never waits for us."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            if select.select([self.master], [], [], 0.05)[0]:
                self.output += os.read(self.master, 65536)
        while select.select([self.master], [], [], 0)[0]:
            self.output += os.read(self.master, 65536)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)
