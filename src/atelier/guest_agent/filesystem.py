"""The Connect service ``filesystem.Filesystem``: Stat, MakeDir, Move, ListDir, Remove, in E2B's shapes.

Registered by the agent's ``__main__``; ``watch`` registers the rest of the service. Everything is done with the rights
of the request's user. Ours beyond E2B: a path may be given as ``pathBytes`` (``sourceBytes``, ``destinationBytes``),
base64 of a name that is no UTF-8, and ListDir can be had in pages (``pageBytes``, ``pageAfter``, ``nextPage``).
Source: E2B's filesystem.proto as published with its SDK 2.63.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat as stat_bits
from collections.abc import Generator
from typing import Any, Final

from atelier.guest_agent.credentials import acting_as
from atelier.guest_agent.directory_tree import ENTRIES_MAX, SLICE_ENTRIES, Components, remove, run_in_slices, walk
from atelier.guest_agent.entries import describe, errors_about, make_parents, show
from atelier.guest_agent.http import Request, Router
from atelier.guest_agent.rpc import Message, add_unary
from atelier.guest_agent.state import AgentState
from atelier.guest_agent.users import User
from atelier.guest_protocol.connect import ConnectError

SERVICE: Final = "/filesystem.Filesystem/"
_DEPTH_MAX: Final = 4096
_ENTRY_OVERHEAD_BYTES: Final = 320


def register(router: Router, state: AgentState) -> None:
    service = FilesystemService(state)
    add_unary(router, SERVICE + "Stat", service.stat)
    add_unary(router, SERVICE + "MakeDir", service.make_dir)
    add_unary(router, SERVICE + "Move", service.move)
    add_unary(router, SERVICE + "ListDir", service.list_dir)
    add_unary(router, SERVICE + "Remove", service.remove)


def path_field(message: Message, name: str) -> bytes:
    """A path in a message: text in ``name``, or exact bytes in ``<name>Bytes``. Raises ConnectError."""
    exact = message.get(name + "Bytes")
    if exact is not None:
        return base64_field(exact, name + "Bytes")
    text = message.get(name, "")
    if not isinstance(text, str):
        raise ConnectError("invalid_argument", f"{name} must be text")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConnectError("invalid_argument", f"{name} is no Unicode text; give {name}Bytes") from None


def base64_field(value: object, name: str) -> bytes:
    try:
        if not isinstance(value, str):
            raise ValueError
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ConnectError("invalid_argument", f"{name} must be base64") from None


def number_field(message: Message, name: str, maximum: int) -> int:
    """A non-negative number, 0 if it is absent; protobuf's JSON may write it as text. Raises ConnectError."""
    value = message.get(name, 0)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConnectError("invalid_argument", f"{name} must be a number")
    return min(value, maximum)


class FilesystemService:
    def __init__(self, state: AgentState) -> None:
        self._state = state

    def _target(self, message: Message, request: Request, name: str = "path") -> tuple[User, bytes]:
        user = self._state.user_of(request)
        return user, self._state.resolve(path_field(message, name), user)

    def _describe(self, path: bytes) -> dict[str, Any]:
        return describe(path, self._state.users)

    async def stat(self, message: Message, request: Request) -> Message:
        user, path = self._target(message, request)
        with errors_about("read", path), acting_as(user):
            return {"entry": self._describe(path)}

    async def make_dir(self, message: Message, request: Request) -> Message:
        """Missing parents are made too; a folder that is there already is ``already_exists``, as E2B has it."""
        user, path = self._target(message, request)
        with errors_about("make the folder", path), acting_as(user):
            if os.path.isdir(path):
                raise ConnectError("already_exists", f"the folder {show(path)} exists already")
            if os.path.lexists(path):
                raise ConnectError("invalid_argument", f"{show(path)} exists already and is no folder")
            make_parents(path)
            return {"entry": self._describe(path)}

    async def move(self, message: Message, request: Request) -> Message:
        """Missing parents of the destination are made; a file that is there is replaced, as rename(2) does."""
        user, source = self._target(message, request, "source")
        _, destination = self._target(message, request, "destination")
        with errors_about("move", source), acting_as(user):
            os.lstat(source)
        with errors_about(f"move {show(source)} to", destination), acting_as(user):
            make_parents(os.path.dirname(destination))
            os.rename(source, destination)
            return {"entry": self._describe(destination)}

    async def remove(self, message: Message, request: Request) -> Message:
        """Files, links and whole folders; what is not there is no error, as E2B has it."""
        user, path = self._target(message, request)
        if path == b"/":
            raise ConnectError("invalid_argument", "the root folder cannot be removed")
        with errors_about("remove", path):
            await run_in_slices(user, remove(path))
        return {}

    async def list_dir(self, message: Message, request: Request) -> Message:
        """Entries in sorted pre-order, links not followed. Without ``pageBytes`` all at once, 100,000 at most."""
        user, path = self._target(message, request)
        depth = number_field(message, "depth", _DEPTH_MAX) or 1
        page_bytes = number_field(message, "pageBytes", 2**31)
        after_text = message.get("pageAfter", "")
        after: Components = tuple(base64_field(after_text, "pageAfter").split(b"/")) if after_text else ()
        with errors_about("list", path):
            with acting_as(user):
                if not stat_bits.S_ISDIR(os.stat(path).st_mode):
                    raise ConnectError("invalid_argument", f"{show(path)} is no folder")
            return await run_in_slices(user, self._listing(path, depth, after, page_bytes))

    def _listing(self, path: bytes, depth: int, after: Components, page_bytes: int) -> Generator[None, None, Message]:
        entries: list[Message] = []
        size = 0
        visited = 0
        for components in walk(path, depth, after):
            visited += 1
            if visited % SLICE_ENTRIES == 0:
                yield
            inner = os.path.join(path, *components)
            try:
                entry = self._describe(inner)
            except FileNotFoundError:
                continue  # it went away since its folder was read
            entries.append(entry)
            size += _ENTRY_OVERHEAD_BYTES + 3 * len(inner)
            if page_bytes and size >= page_bytes:
                return {"entries": entries, "nextPage": base64.b64encode(b"/".join(components)).decode()}
            if len(entries) > ENTRIES_MAX:
                raise ConnectError(
                    "resource_exhausted", f"{show(path)} holds more than {ENTRIES_MAX} entries; list a folder below it"
                )
        return {"entries": entries}
