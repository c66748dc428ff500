"""What ``scripts/demo`` shows, over the public Python SDK: images, a sandbox, programs, files, a fork.

Called by ``scripts/demo`` with the checkout's own Python. It starts its own Atelier with a temporary data and run
folder, and must end with none of these left: processes, sockets, files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from atelier import Sandbox
from atelier.client import calls
from atelier.client.connection import Connection
from atelier.client.environment import Endpoint
from atelier.model.errors import AtelierError
from atelier.schemas.images import BuildDoneEvent

START_SECONDS = 60.0
STOP_SECONDS = 120.0
PAYLOAD_BYTES = 4 * 1024 * 1024
ATELIER = Path(sys.prefix) / "bin" / "atelier"

PIPELINE = "seq 1 200000 | grep 7 | awk '{ sum += $1 } END { printf(\"%d numbers, sum %.0f\\n\", NR, sum) }'"
PROGRAM = textwrap.dedent(
    """\
    import os, platform, sys
    sieve = bytearray([1]) * 200_001
    for n in range(2, 448):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, 200_001, n)))
    print(f"{sum(sieve) - 2} primes below 200,000, counted by Python {platform.python_version()}")
    print(f"on {platform.system()} {platform.release()}, pid {os.getpid()}, host name {platform.node()}")
    """
)

console = Console(highlight=False, soft_wrap=True)


class Stopped(Exception):
    """A signal asked for the end."""


class Phases:
    """Prints each phase when it ends, with its time, and a moving bar while it lasts where the output is a terminal."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[Phase]:
        phase = Phase(name)
        with phase.shown():
            yield phase
        console.print(f"[green]✓[/] {name} [dim]({phase.seconds:.1f} s)[/]{phase.note}")
        for line in phase.lines:
            console.print(f"    {line}", markup=False)

    def total_seconds(self) -> float:
        return time.monotonic() - self._begun


class Phase:
    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = time.monotonic()
        self._progress: Progress | None = None
        self._step = ""
        self.note = ""
        self.lines: list[str] = []
        """What is shown below the phase when it has ended."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        if not console.is_terminal:
            yield
            return
        columns = (
            TextColumn("… {task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as self._progress:
            self._task = self._progress.add_task(self._name, total=None)
            yield
        self._progress = None

    def advance(self, step: str, message: str, fraction: float | None) -> None:
        """``fraction`` from 0 to 1; None while it cannot be known."""
        if self._progress is not None:
            total = None if fraction is None else 1.0
            self._progress.update(
                self._task, description=f"{self._name}: {message[:60]}", total=total, completed=fraction or 0.0
            )
        elif step != self._step:
            console.print(f"    {self._name}: {message}", markup=False)
        self._step = step

    def add(self, text: str) -> None:
        self.lines += text.rstrip("\n").split("\n")


class OwnAtelier:
    """A manager of our own on a free port, with a temporary data and run folder; gone when the block ends."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="atelier-demo."))
        self.data_dir = self.folder / "data"
        self.log = self.folder / "manager.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Endpoint:
        # An inherited key, address or mode belongs to another installation.
        kept = ("ATELIER_CACHE_DIR", "ATELIER_ACCELERATOR")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ATELIER_")}
        environment |= {name: os.environ[name] for name in kept if name in os.environ}
        environment["ATELIER_RUN_DIR"] = str(self.folder / "run")
        # VMMs run under users of their own when this is root, and must get to their sockets' folder.
        self.folder.chmod(0o711)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                # However this program ends, its manager is told to end too.
                [
                    *("setpriv", "--pdeathsig", "INT", str(ATELIER), "up", "--on-exit", "destroy"),
                    *("--data-dir", str(self.data_dir), "--listen", "127.0.0.1:0"),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is ours to pass on, once the sandbox is out of use.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AtelierError("Atelier did not start", hint=f"try {ATELIER} doctor")
            with contextlib.suppress(OSError, ValueError, KeyError, AtelierError):
                found = json.loads((self.data_dir / "token.json").read_bytes())
                endpoint = Endpoint(found["api_url"], found["api_key"])
                with Connection(endpoint) as connection:
                    connection.send(calls.health())
                return endpoint
            time.sleep(0.05)
        raise AtelierError(f"Atelier did not answer within {START_SECONDS:g} s")

    def log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return ""

    def stop(self) -> None:
        """End the manager in good order (it destroys its sandboxes), then remove every trace of it. Twice is once."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise AtelierError(f"Atelier did not stop within {STOP_SECONDS:g} s:\n{self.log_tail()}") from None
        shutil.rmtree(self.folder, ignore_errors=True)

    def left_behind(self) -> list[str]:
        """Processes that still name our folder in their arguments or environment, and what is left of the folder."""
        found = [str(self.folder)] if self.folder.exists() else []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    if bytes(self.folder) in words:
                        found.append(f"process {entry.name}")
        return found


def build_images(connection: Connection, phase: Phase) -> None:
    work_was_done = False
    for event in connection.lines(calls.build_image("base", refresh=False)):
        if isinstance(event, BuildDoneEvent):
            phase.add(f"{event.image.id}: {event.image.stored_bytes / 1e6:.0f} MB on disk")
        else:
            work_was_done = True
            phase.advance(event.phase, event.message, event.fraction)
    if not work_was_done:
        phase.note = " [dim]from the cache[/]"


def work_in(sandbox: Sandbox, phases: Phases) -> None:
    with phases.phase("run a shell pipeline") as phase:
        phase.add(f"$ {PIPELINE}")
        phase.add(sandbox.run(PIPELINE, check=True).stdout)
    with phases.phase("write a Python program and run it") as phase:
        sandbox.files.write("primes.py", PROGRAM)
        phase.add("$ python3 primes.py")
        phase.add(sandbox.run(["python3", "primes.py"], check=True).stdout)
    with phases.phase("write a file in, read another one out") as phase:
        payload = secrets.token_bytes(PAYLOAD_BYTES)
        digest = hashlib.sha256(payload).hexdigest()
        sandbox.files.write("payload.bin", payload)
        sandbox.run("sha256sum payload.bin > payload.sha256 && cp payload.bin copy.bin", check=True)
        told = sandbox.files.read("payload.sha256").split()[0]
        back = hashlib.sha256(sandbox.files.read_bytes("copy.bin")).hexdigest()
        if not told == back == digest:
            raise AtelierError(f"the file came back changed: sent {digest}, in the guest {told}, read {back}")
        phase.add(f"{PAYLOAD_BYTES // 1024**2} MiB there and back, SHA-256 {digest[:16]}… on both sides")


def fork(sandbox: Sandbox, phases: Phases) -> None:
    """A second sandbox that goes on from where the first one is, and cannot be told from it but by its identity."""
    with phases.phase("fork it while it runs") as phase:
        pid = sandbox.run("setsid sleep 3600 >/dev/null 2>&1 & echo $!", check=True).stdout.strip()
        (copy,) = sandbox.fork(1)
        with copy:
            told = copy.run(
                f"cat /proc/{pid}/comm && hostname && sha256sum -c payload.sha256", check=True
            ).stdout.split()
            if told[:2] != ["sleep", copy.name]:
                raise AtelierError(f"the fork is not what was forked: {' '.join(told)}")
            phase.add(f"{copy.name} has the files and the running process {pid}, and a name of its own")


def stay(endpoint: Endpoint, own: OwnAtelier, sandbox: Sandbox) -> None:
    console.print(
        textwrap.dedent(
            f"""
            Atelier stays up. In another terminal:
                export ATELIER_DATA_DIR={own.data_dir}
                {ATELIER} ls
                {ATELIER} shell {sandbox.name}
            The API wants a key: `Authorization: Bearer {endpoint.api_key}`
            Ctrl-C ends it and removes everything."""
        ),
        markup=False,
    )
    while True:
        signal.pause()


def raise_stopped(signal_number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(signal_number).name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Boot a real sandbox and run work in it.")
    parser.add_argument("--once", action="store_true", help="exit when all has been shown")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, raise_stopped)

    phases = Phases()
    own = OwnAtelier()
    status = 0
    try:
        show(own, phases, once=options.once)
    except Stopped as stopped:
        console.print()
        status = 0 if str(stopped) == "SIGINT" and not options.once else 130
    except AtelierError as error:
        console.print("[red]error:[/]", end=" ")
        console.print(error.message, markup=False)
        if error.hint:
            console.print("[yellow]hint:[/]", end=" ")
            console.print(error.hint, markup=False)
        if tail := own.log_tail():
            console.print(f"the manager's last words:\n{textwrap.indent(tail, '    ')}", markup=False)
        status = 1
    finally:
        # A second Ctrl-C would leave a half-removed sandbox; the way out is bounded by STOP_SECONDS.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        try:
            with phases.phase("stop Atelier, remove everything"):
                own.stop()
        finally:
            # Once more, if a terminal that is gone kept the phase from being shown.
            own.stop()
    if left := own.left_behind():
        console.print(f"[red]left behind:[/] {', '.join(left)}")
        return 1
    console.print(f"done in {phases.total_seconds():.1f} s; nothing is left behind but the image cache")
    return status


def show(own: OwnAtelier, phases: Phases, *, once: bool) -> None:
    with phases.phase("start Atelier"):
        endpoint = own.start()
    with Connection(endpoint) as connection:
        with phases.phase("images: kernel, tools, base") as phase:
            build_images(connection, phase)
        with phases.phase("create a sandbox: boot a virtual machine") as phase:
            phase.advance("boot", "booting", None)
            sandbox = Sandbox.create(labels={"made-by": "demo"}, connection=connection)
            details = sandbox.details
            phase.add(
                f"{details.name} ({details.id}): {details.vcpu_count} vCPU, {details.memory_mib} MiB of memory, "
                f"{details.disk_mib} MiB of disk"
            )
        work_in(sandbox, phases)
        fork(sandbox, phases)
        console.print(f"\nAPI documentation: {endpoint.api_url}/docs", markup=False)
        if not once:
            stay(endpoint, own, sandbox)
        with phases.phase("destroy the sandbox"):
            sandbox.destroy()


if __name__ == "__main__":
    sys.exit(main())
