"""Root's side of the network: starts the network holder in root's own folders, and ends it.

The holder is root for as long as it runs, since bridge, TAPs, rules and the host's forwarding are the kernel's; what it
takes is what its socket takes, and that is open to the manager's user alone. Nothing that the asking side says decides
where anything lies or what is run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atelier.host import processes
from atelier.host_setup.root_settings import RootSettings
from atelier.model.errors import InvalidRequestError, TimeoutExceededError
from atelier.model.layout import RunLayout, root_network_layout
from atelier.model.machine import ProcessIdentity

Request = dict[str, Any]

_STATE = Path("/var/lib/atelier-network")
_END_SECONDS = 10.0


class NetworkVerbs:
    def __init__(self, settings: RootSettings, run: RunLayout | None = None, state: Path = _STATE) -> None:
        self._settings = settings
        self._run = (run or root_network_layout(settings.installation_id)).root
        self._state = state / settings.installation_id

    @property
    def verbs(self) -> Mapping[str, Callable[[Request], Awaitable[dict[str, Any]]]]:
        return {"start_holder": self.start_holder, "end_holder": self.end_holder}

    async def start_holder(self, request: Request) -> dict[str, Any]:
        """Start it, or find the one that runs: its pid, and the socket that it will serve once it is ready."""
        _nothing(request)
        identity, log = self._find(), self._state / "network.log"
        if identity is None:
            for folder in (self._run.parent, self._run, self._state.parent, self._state):
                folder.mkdir(exist_ok=True)
                # To be passed through: socket and log have their own modes.
                folder.chmod(0o711)
            identity = await processes.start_detached(self._words, stderr_path=log)
            os.chown(log, 0, self._settings.owner[1])
            log.chmod(0o640)
        return {"process": asdict(identity), "log": str(log)}

    async def end_holder(self, request: Request) -> dict[str, Any]:
        """Nothing if none runs; the network itself stays. One that does not end in order is killed."""
        _nothing(request)
        if (identity := self._find()) is not None:
            try:
                await processes.kill_and_wait(identity, _END_SECONDS, signal_number=15)
            except TimeoutExceededError:
                await processes.kill_and_wait(identity)
        return {}

    @property
    def _words(self) -> list[str]:
        user_id, group_id = self._settings.owner
        return [
            *(sys.executable, "-I", "-m", "atelier.network_holder", "--run-dir", str(self._run)),
            *("--plan-file", str(self._state / "network.json"), "--installation", self._settings.installation_id),
            *("--home", "host", "--bridge-name", self._settings.bridge_name),
            *("--client", f"{user_id}:{group_id}"),
        ]

    def _find(self) -> ProcessIdentity | None:
        found = processes.find_processes(Path(sys.executable).resolve().name, self._words[1:])
        return found[0] if found else None


def _nothing(request: Request) -> None:
    if request:
        raise InvalidRequestError(f"this verb takes nothing, not {', '.join(request)}", code="privilege_refused")
