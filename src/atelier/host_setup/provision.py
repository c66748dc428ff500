"""Looks at the machine, says what is to be changed or in the way, changes it, and takes it back.

All is looked at before anything is changed. Each change is noted in the journal before it is made, so that whatever
interrupts this, the next run goes on; undoing goes through the journal backwards, not through what is configured now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from atelier.host_setup.caddy import undo_caddy_service
from atelier.host_setup.changes import (
    KEPT,
    Change,
    Look,
    LookState,
    Undo,
    UndoOptions,
    undo_file,
    undo_folder,
)
from atelier.host_setup.firecracker_release import undo_firecracker
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Journal, Record
from atelier.host_setup.storage_changes import undo_loop_file, undo_thin_pool, undo_volume_group
from atelier.host_setup.system_changes import undo_live_setting, undo_packages, undo_services, undo_user
from atelier.model.errors import ConflictError

UNDO: Mapping[str, Undo] = {
    "file": undo_file,
    "folder": undo_folder,
    "packages": undo_packages,
    "user": undo_user,
    "setting": undo_live_setting,
    "services": undo_services,
    "loop file": undo_loop_file,
    "volume group": undo_volume_group,
    "thin pool": undo_thin_pool,
    "firecracker": undo_firecracker,
    "caddy service": undo_caddy_service,
}
"""By the kind of change. A kind that is not here writes nothing down."""


@dataclass(frozen=True, slots=True)
class Area:
    """What belongs together: what one command of ``atelier host`` does."""

    name: str
    title: str
    changes: Sequence[Change]


@dataclass(frozen=True, slots=True)
class Survey:
    """``wanted``: (area, what would be made); ``conflicts``: what is in the way."""

    wanted: list[tuple[str, str]]
    conflicts: list[Look]

    def refuse_conflicts(self) -> None:
        """Raises ConflictError (``host_conflict``) with all of them, and what to do about each."""
        if self.conflicts:
            raise ConflictError(
                "this host is not free for Atelier, and nothing was changed: "
                + "; ".join(each.words for each in self.conflicts),
                code="host_conflict",
                hint="\n".join(f"{each.words}: {each.remedy}" for each in self.conflicts),
            )


async def survey(host: Host, journal: Journal, areas: Sequence[Area]) -> Survey:
    """Changes nothing."""
    found = Survey([], [])
    for area in areas:
        for change in area.changes:
            look = await change.look(host, journal.find(change.kind, change.key))
            if look.state is LookState.MISSING:
                found.wanted.append((area.name, look.words))
            elif look.state is LookState.FOREIGN:
                found.conflicts.append(look)
    return found


async def apply(host: Host, journal: Journal, areas: Sequence[Area], say: Callable[[str, str], None]) -> int:
    """How many changes were made. ``say`` is told the area and what is made of it, before it is. Each change is looked at
    again: others have been made since. Raises ConflictError (``host_conflict``), and what changes raise."""
    count = 0
    for area in areas:
        for change in area.changes:
            own = journal.find(change.kind, change.key)
            look = await change.look(host, own)
            Survey([], [look] if look.state is LookState.FOREIGN else []).refuse_conflicts()
            if look.state is LookState.MISSING:
                say(area.name, look.words)

                def note(record: Record, change: Change = change, area: Area = area) -> None:
                    journal.note(area.name, change.kind, change.key, record)

                await change.apply(host, own, note)
                count += 1
            journal.finish(change.kind, change.key)
    return count


@dataclass(frozen=True, slots=True)
class Undone:
    """``kept``: what a later uninstall may still remove; ``left``: what is Atelier's no more, with the reason."""

    removed: list[str]
    kept: list[str]
    left: list[str]


async def undo_all(host: Host, journal: Journal, options: UndoOptions, say: Callable[[str, str], None]) -> Undone:
    done = Undone([], [], [])
    for entry in reversed(list(journal.entries)):
        say(entry.area, f"{entry.kind} {entry.key}")
        if done.kept:
            # What stays is of use only with the programs that made it.
            options = replace(options, packages=False)
        words = await UNDO[entry.kind](host, entry.record, options)
        if words.startswith(KEPT):
            done.kept.append(words.removeprefix(KEPT))
            continue
        journal.remove(entry)
        if words:
            done.left.append(words)
        else:
            done.removed.append(f"{entry.kind} {entry.key}")
    journal.close()
    return done
