"""One thing done to several sandboxes at once: each is tried, those that failed are told after the others.

Called by ``stop``, ``start``, ``restart``, ``pause``, ``resume``, ``retry``, ``extend`` and ``rm``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import click

from atelier.cli.output import print_error, print_json, print_line, print_note, printable
from atelier.cli.progress import waiting
from atelier.client.connection import Connection
from atelier.client.sandbox import Sandbox
from atelier.model.errors import AtelierError
from atelier.schemas.sandboxes import Sandbox as SandboxDetails

T = TypeVar("T")
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Outcomes(Generic[T]):
    """By name, in the order in which they were given."""

    done: list[tuple[str, T]]
    failed: list[tuple[str, AtelierError]]

    def failures_as_json(self) -> list[dict[str, str]]:
        return [{"name": n, "code": e.code, "message": e.message, "hint": e.hint} for n, e in self.failed]

    def finish(self, *, as_json: bool) -> None:
        """Tell of the failures and end with status 1 if there are any."""
        if not as_json:
            for _, error in self.failed:
                print_error(error)
        if self.failed:
            click.get_current_context().exit(1)


def on_each(names: Sequence[str], work: Callable[[str], T], *, doing: str, as_json: bool) -> Outcomes[T]:
    """A name that is given twice counts once. ``doing`` is said on a terminal, before the names, while it lasts."""

    def attempt(name: str) -> tuple[str, T | AtelierError]:
        try:
            return name, work(name)
        except AtelierError as error:
            return name, error

    with (
        waiting(f"{doing} {', '.join(names)}", shown=not as_json and bool(names)),
        ThreadPoolExecutor(_AT_ONCE) as threads,
    ):
        try:
            results = list(threads.map(attempt, dict.fromkeys(names)))
        except KeyboardInterrupt:
            print_note("interrupted; what the manager was told goes on: `atelier ls` shows it")
            # At once: the threads wait for answers, and would keep this process from ending.
            os._exit(128 + signal.SIGINT)
    outcomes: Outcomes[T] = Outcomes([], [])
    for name, result in results:
        if isinstance(result, AtelierError):
            outcomes.failed.append((name, result))
        else:
            outcomes.done.append((name, result))
    return outcomes


def change_sandboxes(
    connection: Connection,
    names: Sequence[str],
    change: Callable[[Sandbox], SandboxDetails],
    *,
    doing: str,
    word: str,
    as_json: bool,
    note: Callable[[SandboxDetails], str] = lambda _: "",
) -> None:
    """Do ``change`` to each and print the names of those that it worked for, or JSON ``{word: [sandbox], failed:
    [...]}``. ``note`` is what there is to say about one, beside the result; empty: nothing."""

    def work(name: str) -> SandboxDetails:
        return change(Sandbox.connect(name, connection=connection))

    outcomes = on_each(names, work, doing=doing, as_json=as_json)
    if as_json:
        changed = [details.model_dump(mode="json") for _, details in outcomes.done]
        print_json({word: changed, "failed": outcomes.failures_as_json()})
    else:
        for _, details in outcomes.done:
            print_line(printable(details.name))
            if remark := note(details):
                print_note(f"{printable(details.name)}: {printable(remark)}")
    outcomes.finish(as_json=as_json)
