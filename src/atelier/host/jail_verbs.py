"""The verbs of ``VmmPrivileges`` as the privileged helper program takes them: a JSON object in, one out.

Made by that program over its own ``RootJails``; ``drivers.vmm.asked_jails`` is the asking side. What is asked for is
checked here for its form and in ``RootJails`` for whether it may be granted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atelier.host.jails import RootJails
from atelier.model.jail import file_names_from_json, jail_request_from_json, jail_start_from_json, word_from_json

Request = dict[str, Any]
Answer = dict[str, Any]
Verb = Callable[[Request], Awaitable[Answer]]


class JailVerbs:
    """Each raises KeyError, TypeError, ValueError for what has not the form of a request, and as ``RootJails`` does."""

    def __init__(self, jails: RootJails) -> None:
        self._jails = jails

    @property
    def verbs(self) -> Mapping[str, Verb]:
        return {
            "list_jails": self._list,
            "prepare_jail": self._prepare,
            "start": self._start,
            "grant": self._grant,
            "add_files": self._add_files,
            "take_file": self._take_file,
            "remove_files": self._remove_files,
            "flush_disk": self._flush_disk,
            "set_link": self._set_link,
            "kill": self._kill,
            "remove_jail": self._remove_jail,
        }

    async def _list(self, request: Request) -> Answer:
        del request
        return {"jails": [jail.to_json() for jail in await self._jails.list_jails()]}

    async def _prepare(self, request: Request) -> Answer:
        await self._jails.prepare_jail(jail_request_from_json(request))
        return {}

    async def _start(self, request: Request) -> Answer:
        return {"process": asdict(await self._jails.start(jail_start_from_json(request)))}

    async def _grant(self, request: Request) -> Answer:
        await self._jails.grant(_machine(request))
        return {}

    async def _add_files(self, request: Request) -> Answer:
        await self._jails.add_files(_machine(request), file_names_from_json(request["names"]))
        return {}

    async def _take_file(self, request: Request) -> Answer:
        name, target = word_from_json(request["name"]), Path(word_from_json(request["target"]))
        await self._jails.take_file(_machine(request), name, target)
        return {}

    async def _remove_files(self, request: Request) -> Answer:
        await self._jails.remove_files(_machine(request), file_names_from_json(request["names"]))
        return {}

    async def _flush_disk(self, request: Request) -> Answer:
        await self._jails.flush_disk(_machine(request))
        return {}

    async def _set_link(self, request: Request) -> Answer:
        await self._jails.set_link(_machine(request), word_from_json(request["tap"]), up=request["up"] is True)
        return {}

    async def _kill(self, request: Request) -> Answer:
        await self._jails.kill(_machine(request))
        return {}

    async def _remove_jail(self, request: Request) -> Answer:
        await self._jails.remove_jail(_machine(request))
        return {}


def _machine(request: Request) -> str:
    return word_from_json(request["machine_id"])
