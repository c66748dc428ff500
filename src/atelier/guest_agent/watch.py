"""The watching part of ``filesystem.Filesystem``: WatchDir as a stream; CreateWatcher, GetWatcherEvents and
RemoveWatcher for those who poll.

Registered by the agent's ``__main__``. ctypes and inotify are loaded with the first watch. A polled watcher that nobody
has asked for ten minutes gives its place to a new one when there are too many. Differs from E2B: folders on network
file systems are watched without asking (their events may be incomplete), and a stream ends when its folder is removed.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from atelier.guest_agent.directory_tree import run_in_slices
from atelier.guest_agent.entries import error_from
from atelier.guest_agent.filesystem import SERVICE, path_field
from atelier.guest_agent.http import Request, Router
from atelier.guest_agent.rpc import Message, add_server_stream, add_unary, timeout_seconds
from atelier.guest_agent.state import AgentState
from atelier.guest_protocol.connect import ConnectError

if TYPE_CHECKING:
    from atelier.guest_agent.folder_watch import FolderWatch

WATCHERS_MAX: Final = 64
_IDLE_SECONDS: Final = 600.0
_KEEPALIVE_SECONDS: Final = 90.0
_KEEPALIVE_MIN_SECONDS: Final = 1.0
_BATCH_EVENTS: Final = 256


def register(router: Router, state: AgentState) -> None:
    service = WatchService(state)
    add_server_stream(router, SERVICE + "WatchDir", service.watch_dir)
    add_unary(router, SERVICE + "CreateWatcher", service.create_watcher)
    add_unary(router, SERVICE + "GetWatcherEvents", service.get_watcher_events)
    add_unary(router, SERVICE + "RemoveWatcher", service.remove_watcher)


@dataclass(slots=True)
class _Polled:
    watch: FolderWatch
    asked_at: float


def _keepalive_seconds(request: Request) -> float:
    text = request.headers.get("keepalive-ping-interval", "")
    if text.isascii() and text.isdigit() and len(text) < 6:
        return max(_KEEPALIVE_MIN_SECONDS, float(text))
    return _KEEPALIVE_SECONDS


class WatchService:
    def __init__(self, state: AgentState) -> None:
        self._state = state
        self._watchers: dict[str, _Polled] = {}

    async def watch_dir(self, message: Message, request: Request) -> AsyncIterator[Message]:
        loop = asyncio.get_running_loop()
        limit = timeout_seconds(request)
        deadline = loop.time() + limit if limit is not None else float("inf")
        keepalive = _keepalive_seconds(request)
        watch = await self._open(message, request)
        try:
            yield {"start": {}}
            while True:
                events = watch.take(_BATCH_EVENTS)
                for event in events:
                    yield {"filesystem": event}
                if loop.time() >= deadline:
                    raise ConnectError("deadline_exceeded", "the watch's time is over")
                if events:
                    continue
                if watch.ended:
                    return
                if not await watch.wait(min(keepalive, deadline - loop.time())) and loop.time() < deadline:
                    yield {"keepalive": {}}
        finally:
            watch.close()

    async def create_watcher(self, message: Message, request: Request) -> Message:
        self._make_room()
        watch = await self._open(message, request)
        identifier = "w" + os.urandom(8).hex()
        self._watchers[identifier] = _Polled(watch, asyncio.get_running_loop().time())
        return {"watcherId": identifier}

    async def get_watcher_events(self, message: Message, request: Request) -> Message:
        """Everything that had happened when the call came in: the kernel's queue is read out here and now."""
        polled = self._watchers.get(_watcher_id(message))
        if polled is None:
            raise _no_such_watcher(message)
        polled.asked_at = asyncio.get_running_loop().time()
        return {"events": polled.watch.take()}

    async def remove_watcher(self, message: Message, request: Request) -> Message:
        polled = self._watchers.pop(_watcher_id(message), None)
        if polled is None:
            raise _no_such_watcher(message)
        polled.watch.close()
        return {}

    async def _open(self, message: Message, request: Request) -> FolderWatch:
        from atelier.guest_agent.folder_watch import FolderWatch

        user = self._state.user_of(request)
        path = self._state.resolve(path_field(message, "path"), user)
        watch: FolderWatch | None = None
        try:
            watch = FolderWatch(
                path,
                user,
                self._state.users,
                recursive=message.get("recursive") is True,
                include_entry=message.get("includeEntry") is True,
            )
            await run_in_slices(user, watch.begin())
        except OSError as error:
            if watch is not None:
                watch.close()
            if error.errno == errno.ENOTDIR:
                raise ConnectError(
                    "invalid_argument", f"cannot watch {path.decode(errors='replace')}: no folder"
                ) from error
            raise error_from(error, "watch", path) from error
        except BaseException:
            if watch is not None:
                watch.close()
            raise
        return watch

    def _make_room(self) -> None:
        if len(self._watchers) < WATCHERS_MAX:
            return
        identifier, polled = min(self._watchers.items(), key=lambda item: item[1].asked_at)
        if asyncio.get_running_loop().time() - polled.asked_at < _IDLE_SECONDS:
            raise ConnectError("resource_exhausted", f"{WATCHERS_MAX} watchers are in use; remove one first")
        del self._watchers[identifier]
        polled.watch.close()


def _watcher_id(message: Message) -> str:
    identifier = message.get("watcherId", "")
    return identifier if isinstance(identifier, str) else ""


def _no_such_watcher(message: Message) -> ConnectError:
    return ConnectError("not_found", f"no watcher {_watcher_id(message)[:64]!r}")
