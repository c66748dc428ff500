"""``VmmPrivileges`` where the manager is not root: each verb is asked of the privileged helper program, which grants it by
``host.jail_verbs``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from atelier.model.errors import HostError
from atelier.model.jail import Jail, JailPlaces, JailRequest, JailStart, request_to_json
from atelier.model.machine import ProcessIdentity


class Asking(Protocol):
    """How the helper is asked."""

    async def ask(self, verb: str, **fields: object) -> dict[str, Any]:
        """The answer's fields. Raises what the helper's side raises, and HostError."""
        ...


class AskedJails:
    """``places``: where the helper makes jails, as root's own settings say."""

    def __init__(self, helper: Asking, places: JailPlaces) -> None:
        self._helper = helper
        self._places = places

    @property
    def places(self) -> JailPlaces:
        return self._places

    async def list_jails(self) -> list[Jail]:
        answer = await self._helper.ask("list_jails")
        try:
            return [Jail.from_json(each) for each in answer["jails"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _nonsense("list_jails") from error

    async def prepare_jail(self, request: JailRequest) -> None:
        await self._helper.ask("prepare_jail", **request_to_json(request))

    async def start(self, request: JailStart) -> ProcessIdentity:
        answer = await self._helper.ask("start", **request_to_json(request))
        try:
            return ProcessIdentity(**answer["process"])
        except (KeyError, TypeError) as error:
            raise _nonsense("start") from error

    async def grant(self, machine_id: str) -> None:
        await self._helper.ask("grant", machine_id=machine_id)

    async def add_files(self, machine_id: str, names: tuple[str, ...]) -> None:
        await self._helper.ask("add_files", machine_id=machine_id, names=list(names))

    async def take_file(self, machine_id: str, name: str, target: Path) -> None:
        await self._helper.ask("take_file", machine_id=machine_id, name=name, target=str(target))

    async def remove_files(self, machine_id: str, names: tuple[str, ...]) -> None:
        await self._helper.ask("remove_files", machine_id=machine_id, names=list(names))

    async def flush_disk(self, machine_id: str) -> None:
        await self._helper.ask("flush_disk", machine_id=machine_id)

    async def set_link(self, machine_id: str, tap: str, *, up: bool) -> None:
        await self._helper.ask("set_link", machine_id=machine_id, tap=tap, up=up)

    async def kill(self, machine_id: str) -> None:
        await self._helper.ask("kill", machine_id=machine_id)

    async def remove_jail(self, machine_id: str) -> None:
        await self._helper.ask("remove_jail", machine_id=machine_id)


def _nonsense(verb: str) -> HostError:
    return HostError(
        f"the privileged helper's answer to {verb} makes no sense", hint="is it of the same version as the manager?"
    )
