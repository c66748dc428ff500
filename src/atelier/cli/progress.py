"""Progress on stderr: a live bar when it is a terminal, plain lines or nothing otherwise.

rich is imported only when a bar is really shown.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING

from atelier.cli.output import print_note, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class PhaseProgress:
    """Long work in phases: a bar for the one that runs; without a terminal one line for each phase."""

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""

    def __enter__(self) -> PhaseProgress:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.fields[phase]:<12}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            if self._task is not None and kind is None:
                self._progress.update(self._task, total=1.0, completed=1.0, description="done")
            self._progress.stop()

    def report(self, phase: str, message: str, fraction: float | None) -> None:
        """``fraction``: 0.0 to 1.0, or None while it cannot be known."""
        is_new, self._phase = phase != self._phase, phase
        if self._progress is None:
            if self._shown and is_new:
                print_note(f"{printable(phase)}: {printable(message)}")
            return
        if is_new or self._task is None:
            if self._task is not None:
                self._progress.update(self._task, total=1.0, completed=1.0, description="done")
            self._task = self._progress.add_task("", total=None, phase=printable(phase))
        total = None if fraction is None else 1.0
        self._progress.update(self._task, total=total, completed=fraction or 0.0, description=printable(message))


@contextlib.contextmanager
def waiting(text: str, *, shown: bool = True) -> Generator[None]:
    """A moving line that says what is waited for; it vanishes with the block. Nothing without a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    # What is printed meanwhile goes where it was meant to go.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        progress.add_task(printable(text), total=None)
        yield


class ByteProgress:
    """A copy: bytes moved so far, the rate, and the rest if the whole is known. Nothing without a terminal."""

    def __init__(self, label: str, *, total_bytes: int | None, shown: bool = True) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._shown = shown and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ByteProgress:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task(printable(self._label), total=self._total_bytes)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, byte_count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, byte_count)
