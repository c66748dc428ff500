"""QEMU's migration as our two uses need it: a machine's state out through a descriptor, and in through one.

Called by the QEMU driver's saving, restoring and baking. QEMU may spawn nothing and open nothing, so all goes by passed
descriptors. Source: QEMU qapi/migration.json, docs/devel/migration.rst, 7.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from atelier.drivers.vmm.qmp import JsonObject, QmpConnection
from atelier.model.errors import VmmError

_POLL_SECONDS = 0.001
_UNDER_WAY = frozenset({"setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug"})
_ENDED = frozenset({"completed", "failed", "cancelled"})
# What a machine is in that was stopped by a migration. "paused" are one that was stopped to be saved, and one that was
# never let run after its restoration, whose network link is not down yet: who saves sets pause-before-switchover, who
# restores clears it.
_STOPPED_BY_MIGRATION = frozenset({"postmigrate", "finish-migrate"})


@dataclass(frozen=True, slots=True)
class Progress:
    """``syncs``: how often QEMU has taken over which pages were written to, and begun to note anew; 0 before it has begun.
    ``remaining_bytes``: memory not sent yet, as far as it knows since then."""

    status: str
    remaining_bytes: int
    syncs: int
    error: str

    @property
    def under_way(self) -> bool:
        return self.status in _UNDER_WAY


async def query_progress(control: QmpConnection) -> Progress:
    answer = await control.query("query-migrate")
    memory = cast("JsonObject", answer.get("ram") or {})
    remaining, syncs = memory.get("remaining"), memory.get("dirty-sync-count")
    return Progress(
        status=str(answer.get("status", "none")),
        remaining_bytes=remaining if isinstance(remaining, int) else 0,
        syncs=syncs if isinstance(syncs, int) else 0,
        error=str(answer.get("error-desc", "QEMU gives no reason")),
    )


async def wait_until(control: QmpConnection, *statuses: str) -> Progress:
    """Raises VmmError when the migration fails or ends otherwise."""
    while (progress := await query_progress(control)).status not in statuses:
        if progress.status in _ENDED:
            raise VmmError(f"the machine's state was not carried over ({progress.status}): {progress.error}")
        await asyncio.sleep(_POLL_SECONDS)
    return progress


async def send_state(
    control: QmpConnection, descriptor: int, *, with_memory: bool, pause_before_switchover: bool
) -> None:
    """Begin to send the machine's state; ``with_memory`` False leaves out what lies in a shared file."""
    await _set_capabilities(control, ignore_shared=not with_memory, pause_before_switchover=pause_before_switchover)
    await control.execute("getfd", {"fdname": "state"}, descriptors=[descriptor])
    await control.execute("migrate", {"uri": "fd:state"})


async def load_state(control: QmpConnection, state: Path, *, with_memory: bool) -> None:
    """Load what ``send_state`` has written into a machine that waits for it; it is stopped afterwards.

    Raises VmmError. A QEMU that does not understand what it reads ends, with its reason on stderr.
    """
    await _set_capabilities(control, ignore_shared=not with_memory, pause_before_switchover=False)
    # Else QEMU would tell the network that the machine has moved, under its parent's address.
    await control.execute("migrate-set-parameters", {"announce-rounds": 0})
    try:
        descriptor = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise VmmError(f"the saved machine cannot be read: {state}: {error.strerror}") from error
    try:
        await control.execute("getfd", {"fdname": "state"}, descriptors=[descriptor])
    finally:
        os.close(descriptor)
    await control.execute("migrate-incoming", {"uri": "fd:state"})
    await wait_until(control, "completed")


async def run_on(control: QmpConnection) -> None:
    """Let a machine run that a migration stopped; one that is under way is cancelled. Nothing if it runs."""
    progress = await query_progress(control)
    if progress.under_way:
        # It may come to its end by itself meanwhile.
        with contextlib.suppress(VmmError):
            await control.execute("migrate_cancel")
        await wait_until(control, *_ENDED)
    status = await query_status(control)
    if status in _STOPPED_BY_MIGRATION or (status == "paused" and await _is_being_saved(control)):
        await control.execute("cont")


async def stop_to_save(control: QmpConnection) -> None:
    """Have the machine stand still before any of it is sent; ``run_on`` knows why it does."""
    await _set_capabilities(control, ignore_shared=False, pause_before_switchover=True)
    await control.execute("stop")


async def _is_being_saved(control: QmpConnection) -> bool:
    answer = await control.execute("query-migrate-capabilities")
    capabilities = cast("list[JsonObject]", answer)
    return any(each["capability"] == "pause-before-switchover" and each["state"] for each in capabilities)


async def query_status(control: QmpConnection) -> str:
    """Whether the machine runs, and why not. Source: QEMU qapi/run-state.json (RunState)."""
    return str((await control.query("query-status")).get("status", ""))


async def query_version(control: QmpConnection) -> str:
    """``major.minor.micro`` of the QEMU that runs."""
    version = cast("JsonObject", (await control.query("query-version")).get("qemu") or {})
    return ".".join(str(version.get(part, "?")) for part in ("major", "minor", "micro"))


async def _set_capabilities(control: QmpConnection, *, ignore_shared: bool, pause_before_switchover: bool) -> None:
    wanted: Collection[tuple[str, bool]] = (
        ("x-ignore-shared", ignore_shared),
        ("pause-before-switchover", pause_before_switchover),
    )
    capabilities = [{"capability": name, "state": state} for name, state in wanted]
    await control.execute("migrate-set-capabilities", {"capabilities": capabilities})
