"""What ``terminal`` shows in the user's own terminal: a program that runs in one for this user alone, or a terminal that
lives on in the sandbox, for whoever looks.

Made by ``shell`` and ``exec -t``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from atelier.cli.output import printable
from atelier.client import calls, terminal_calls
from atelier.client.connection import AsyncConnection
from atelier.client.environment import Endpoint
from atelier.client.terminal import AsyncTerminal
from atelier.model.errors import AtelierError, ConflictError, NotFoundError
from atelier.model.guest import ProcessStarted, TerminalSize
from atelier.schemas.terminals import Terminal

_ID = re.compile(r"[0-9a-f]{12}")


class ShownTerminal(Protocol):
    """``greeting``: for the user, before anything else is shown; may be empty. ``farewell``: how to come back to it.
    ``is_found``: it exists by now, so that it can be attached to again."""

    @property
    def greeting(self) -> str: ...

    @property
    def farewell(self) -> str: ...

    @property
    def is_found(self) -> bool: ...

    async def open(self, size: TerminalSize, *, again: bool = False) -> AsyncTerminal[Any]:
        """``again``: after its connection was lost. Raises AtelierError."""
        ...

    def hear(self, event: object) -> None: ...

    async def hang_up(self) -> None:
        """The user's own terminal has gone."""
        ...


class OneShot:
    """``command`` empty: a login shell. ``pid``: one that runs in a terminal already, instead of a new one."""

    greeting = ""

    def __init__(
        self,
        endpoint: Endpoint,
        sandbox: str,
        command: Sequence[str] = (),
        *,
        user: str = "",
        working_directory: str = "",
        pid: int | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._sandbox = sandbox
        self._command = command
        self._user = user
        self._working_directory = working_directory
        self._pid = pid

    @property
    def farewell(self) -> str:
        return f"process {self._pid} still runs: atelier shell --attach {self._pid} {self._sandbox}"

    @property
    def is_found(self) -> bool:
        return self._pid is not None

    async def open(self, size: TerminalSize, *, again: bool = False) -> AsyncTerminal[Any]:
        socket = terminal_calls.one_shot_terminal(
            self._sandbox,
            self._command,
            size=size,
            user=self._user,
            working_directory=self._working_directory,
            pid=self._pid,
        )
        return await (await AsyncTerminal.open(self._endpoint, socket)).begin()

    def hear(self, event: object) -> None:
        if isinstance(event, ProcessStarted):
            self._pid = event.pid

    async def hang_up(self) -> None:
        """As when a modem line drops: the program is told. One that ignores it lives on."""
        if self._pid is None:
            return
        with suppress(AtelierError):
            async with AsyncConnection(self._endpoint) as connection:
                await connection.send(calls.send_signal(self._sandbox, self._pid, "SIGHUP"))


class LastingTerminal:
    """One that lives on, and that nothing here ends."""

    is_found = True

    def __init__(self, endpoint: Endpoint, sandbox: str, details: Terminal) -> None:
        self._endpoint = endpoint
        self._sandbox = sandbox
        self._id = details.id
        named = f" {printable(details.title)!r}" if details.title else ""
        self.greeting = (
            f"terminal {details.id}{named} with {printable(' '.join(details.command))[:200]}; "
            "Ctrl-] three times leaves it, and it goes on"
        )
        self.farewell = f"the terminal goes on: atelier shell --session {details.id} {sandbox}"

    async def open(self, size: TerminalSize, *, again: bool = False) -> AsyncTerminal[Any]:
        # Coming back by itself is no use of the sandbox: one that was paused meanwhile stays so.
        socket = terminal_calls.attach_terminal(self._sandbox, self._id, size, wake=not again)
        return await (await AsyncTerminal.open(self._endpoint, socket)).begin()

    def hear(self, event: object) -> None:
        pass

    async def hang_up(self) -> None:
        pass


async def find_or_open(
    endpoint: Endpoint,
    sandbox: str,
    name: str,
    command: Sequence[str],
    *,
    size: TerminalSize,
    user: str,
    working_directory: str,
) -> LastingTerminal:
    """The terminal of this id or title; if there is none of this title, a new one with ``command``. Raises NotFoundError
    for an id, ConflictError where several have the title."""
    async with AsyncConnection(endpoint) as connection:
        listed = (await connection.send(terminal_calls.list_terminals(sandbox, wake=True))).items
        try:
            found = choose_terminal(listed, sandbox, name)
        except NotFoundError:
            if _ID.fullmatch(name):
                raise
            call = terminal_calls.open_terminal(
                sandbox, command, title=name, size=size, user=user, working_directory=working_directory
            )
            found = await connection.send(call)
    return LastingTerminal(endpoint, sandbox, found)


def choose_terminal(terminals: Sequence[Terminal], sandbox: str, name: str) -> Terminal:
    """That of this id; else the one of this title, of which one that runs goes before those that have ended. Raises
    NotFoundError, ConflictError."""
    for each in terminals:
        if each.id == name:
            return each
    titled = [each for each in terminals if each.title == name]
    titled = [each for each in titled if each.exit_code is None] or titled
    if not titled:
        raise NotFoundError(
            f"sandbox {sandbox} has no terminal {name}",
            code="terminal_not_found",
            hint=f"atelier terminals {sandbox} lists them",
        )
    if len(titled) > 1:
        raise ConflictError(
            f"sandbox {sandbox} has {len(titled)} terminals of the name {name}",
            code="terminal_ambiguous",
            hint=f"say which by its id: {', '.join(each.id for each in titled)}",
        )
    return titled[0]
