"""Terminals that live on in a sandbox while nobody looks at them, as the SDK shows them: ``sandbox.terminals``.

Made by ``sandbox.py``. One that ends with its program and has one reader, which misses nothing, is
``sandbox.open_terminal``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from atelier.client import terminal_calls
from atelier.client.calls import Command
from atelier.client.connection import AsyncConnectionLease, ConnectionLease
from atelier.client.terminal_calls import ViewerEvent
from atelier.model.guest import TerminalSize
from atelier.schemas.terminals import Terminal as TerminalDetails

if TYPE_CHECKING:
    # Loaded on first use, as in ``sandbox.py``.
    from atelier.client.terminal import AsyncTerminal, Terminal

_SIZE: Final = TerminalSize(80, 24)


class Terminals:
    """Each is known by its id; ``title`` is for people, and need not be the only one of that name."""

    def __init__(self, lease: ConnectionLease, sandbox: str) -> None:
        self._lease = lease
        self._sandbox = sandbox

    def list(self) -> list[TerminalDetails]:
        """Oldest first; those whose programs have ended are among them for an hour."""
        return self._lease.connection.send(terminal_calls.list_terminals(self._sandbox)).items

    def open(
        self,
        command: Command = (),
        *,
        title: str = "",
        size: TerminalSize = _SIZE,
        user: str = "",
        working_directory: str = "",
    ) -> TerminalDetails:
        """Start ``command`` (none: a login shell) in a terminal that goes on until it ends or is closed. ``title`` empty:
        what the program calls it. Raises GuestError (``guest_resource_exhausted``) when 32 are open."""
        call = terminal_calls.open_terminal(
            self._sandbox, command, title=title, size=size, user=user, working_directory=working_directory
        )
        return self._lease.connection.send(call)

    def attach(self, terminal: str, *, size: TerminalSize = _SIZE) -> Terminal[ViewerEvent]:
        """Look at a terminal in a window of ``size``: what was written before, then what follows. It is as large as the
        smallest window. Closing the result ends nothing. Raises NotFoundError (``terminal_not_found``)."""
        from atelier.client.terminal import Terminal

        return Terminal(self._lease.endpoint, terminal_calls.attach_terminal(self._sandbox, terminal, size)).begin()

    def rename(self, terminal: str, title: str) -> TerminalDetails:
        """``title`` empty: what its program calls it."""
        return self._lease.connection.send(terminal_calls.rename_terminal(self._sandbox, terminal, title))

    def close(self, terminal: str) -> None:
        """End its program, by force after 3 s. Raises NotFoundError."""
        self._lease.connection.send(terminal_calls.close_terminal(self._sandbox, terminal))


class AsyncTerminals:
    """The same on asyncio."""

    def __init__(self, lease: AsyncConnectionLease, sandbox: str) -> None:
        self._lease = lease
        self._sandbox = sandbox

    async def list(self) -> list[TerminalDetails]:
        """See ``Terminals``."""
        return (await self._lease.connection.send(terminal_calls.list_terminals(self._sandbox))).items

    async def open(
        self,
        command: Command = (),
        *,
        title: str = "",
        size: TerminalSize = _SIZE,
        user: str = "",
        working_directory: str = "",
    ) -> TerminalDetails:
        """See ``Terminals``."""
        call = terminal_calls.open_terminal(
            self._sandbox, command, title=title, size=size, user=user, working_directory=working_directory
        )
        return await self._lease.connection.send(call)

    async def attach(self, terminal: str, *, size: TerminalSize = _SIZE) -> AsyncTerminal[ViewerEvent]:
        """See ``Terminals``."""
        from atelier.client.terminal import AsyncTerminal

        socket = terminal_calls.attach_terminal(self._sandbox, terminal, size)
        return await (await AsyncTerminal.open(self._lease.endpoint, socket)).begin()

    async def rename(self, terminal: str, title: str) -> TerminalDetails:
        """See ``Terminals``."""
        return await self._lease.connection.send(terminal_calls.rename_terminal(self._sandbox, terminal, title))

    async def close(self, terminal: str) -> None:
        """See ``Terminals``."""
        await self._lease.connection.send(terminal_calls.close_terminal(self._sandbox, terminal))
