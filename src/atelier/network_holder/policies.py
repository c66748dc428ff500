"""Keeps what each sandbox may reach in files of the run directory, so that it outlives the network holder.

A file is written before the rules are, so a holder that starts anew closes what its predecessor was told to close. They
are for this boot only, as the rules and the slots are.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from atelier.host.files import ensure_private_folder, write_atomically
from atelier.model.errors import InvalidRequestError
from atelier.model.network_policy import CLOSED_POLICY, NetworkPolicy

_logger = logging.getLogger(__name__)

_GENERATION_BITS = 32


@dataclass(frozen=True, slots=True)
class KeptPolicy:
    """``generation``: what the conntrack entries of this policy's flows are marked with."""

    policy: NetworkPolicy
    generation: int


def new_generation() -> int:
    """By chance, from 1 to 2^32 - 1: an entry may outlive the sandbox whose address it bears by days, and no count would
    outlive the holder's files as surely."""
    return 1 + secrets.randbelow((1 << _GENERATION_BITS) - 1)


class PolicyFiles:
    """JSON ``{"policy": <as in model.network_policy>, "generation": int}``, one file per sandbox."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, sandbox_ids: Collection[str]) -> None:
        """Have the folder, with files of these sandboxes and no others."""
        ensure_private_folder(self._folder)
        kept = {self._file(sandbox_id).name for sandbox_id in sandbox_ids}
        for file in self._folder.iterdir():
            if file.name not in kept:
                file.unlink(missing_ok=True)

    def read(self, sandbox_id: str) -> KeptPolicy:
        """Closed, of a new generation, where there is no file that can be read."""
        file = self._file(sandbox_id)
        try:
            content: Any = json.loads(file.read_bytes())
            policy = NetworkPolicy.from_json(cast("dict[str, Any]", content)["policy"])
            generation = int(content["generation"])
            if not 0 < generation < 1 << _GENERATION_BITS:
                raise ValueError(f"the generation {generation} is none")
        except (OSError, ValueError, KeyError, TypeError, RecursionError, InvalidRequestError) as error:
            _logger.warning(
                "%s cannot be read (%s): sandbox %s is closed until it is told anew", file, error, sandbox_id
            )
            return KeptPolicy(CLOSED_POLICY, new_generation())
        return KeptPolicy(policy, generation)

    def write(self, sandbox_id: str, policy: NetworkPolicy, generation: int) -> None:
        """Raises HostError."""
        content = json.dumps({"policy": policy.to_json(), "generation": generation})
        write_atomically(self._file(sandbox_id), content.encode() + b"\n", durable=False)

    def remove(self, sandbox_id: str) -> None:
        """Idempotent."""
        self._file(sandbox_id).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """With the folder. Idempotent."""
        if self._folder.is_dir():
            for file in self._folder.iterdir():
                file.unlink(missing_ok=True)
            self._folder.rmdir()

    def _file(self, sandbox_id: str) -> Path:
        return self._folder / f"{sandbox_id}.json"
