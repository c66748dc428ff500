"""``atelier backup`` and ``atelier restore``, as the manager's program runs them: what they say, to people or as JSON."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from atelier.config.settings import Settings
from atelier.manager.backup import Backup, take_backup
from atelier.manager.backup_archive import VolumeEntry
from atelier.manager.restore import Restored, restore_backup
from atelier.model.errors import HostError
from atelier.model.layout import DataLayout

_SHOWN_NAMES = 20


def run_backup(settings: Settings, target: str, *, with_disks: bool, force: bool, as_json: bool) -> int:
    """Write the backup and tell what is in it; returns the exit status."""
    _end_orderly_on_sigterm()
    data = DataLayout(settings.data_dir)
    try:
        made = take_backup(data, settings.cache_dir / "images", Path(target), with_disks=with_disks, force=force)
    except OSError as error:
        raise HostError(f"the backup {target} could not be written: {error}", code="backup_failed") from error
    _say(_backup_document(made) if as_json else _tell_backup(made, with_disks=with_disks))
    return 0


def run_restore(settings: Settings, archive: str, *, as_json: bool) -> int:
    """Bring the backup back and tell what was done; returns the exit status."""
    _end_orderly_on_sigterm()
    try:
        restored = restore_backup(DataLayout(settings.data_dir), Path(archive))
    except OSError as error:
        raise HostError(f"the backup {archive} could not be restored: {error}", code="restore_failed") from error
    _say(_restored_document(restored) if as_json else _tell_restored(restored))
    return 0


def _backup_document(made: Backup) -> dict[str, Any]:
    return {"path": str(made.path), "size_bytes": made.size_bytes, "manifest": made.manifest.model_dump(mode="json")}


def _tell_backup(made: Backup, *, with_disks: bool) -> list[str]:
    manifest = made.manifest
    included = [entry for entry in manifest.volumes if not entry.left_out]
    left_out = [entry for entry in manifest.volumes if entry.left_out]
    lines = [
        f"wrote {made.path}: {_mib(made.size_bytes)}",
        f"in it: the database ({_count(manifest.sandboxes, 'sandbox', 'sandboxes')})"
        + (" and the key; keep it as you keep the key" if made.holds_key else "; there is no key yet"),
    ]
    if included:
        lines.append(f"in it: the {_disks(included)}")
    if left_out and not with_disks:
        lines.append(f"not in it: the {_disks(left_out)}; --with-disks takes those of sandboxes that do not run")
    elif left_out:
        lines.append(f"not in it: the {_disks(left_out)}")
        lines += [f"  {entry.name}: {entry.left_out}" for entry in left_out]
    return lines


def _list(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more (--json names all)" if more > 0 else "")


def _restored_document(restored: Restored) -> dict[str, Any]:
    document = dataclasses.asdict(restored)
    document["manifest"] = restored.manifest.model_dump(mode="json")
    document["replaced"] = str(restored.replaced) if restored.replaced else None
    return document


def _tell_restored(restored: Restored) -> list[str]:
    manifest = restored.manifest
    lines = [f"restored the database of {manifest.created_at}: {_count(manifest.sandboxes, 'sandbox', 'sandboxes')}"]
    if restored.replaced:
        lines.append(f"the one that was there is kept as {restored.replaced}")
    if restored.key_kept:
        lines.append("the key of this folder stays as it is")
    for names, words in (
        (restored.disks_restored, "disks brought back"),
        (restored.disks_kept, "disks that were here already and stay as they are"),
        (restored.without_disk, "sandboxes without a disk here, which cannot run"),
        (restored.unowned_disks, "disks that belong to no sandbox of this backup, and stay in the data folder"),
    ):
        if names:
            lines.append(f"{words}: {_list(names)}")
    return [*lines, "start with `atelier up`"]


def _disks(entries: list[VolumeEntry]) -> str:
    used = _mib(sum(entry.used_bytes for entry in entries))
    return f"{_count(len(entries), 'disk', 'disks')} of {_list([entry.name for entry in entries])} ({used} in all)"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _say(told: list[str] | dict[str, Any]) -> None:
    # A backup may come from anywhere: nothing in it reaches the terminal as a command.
    lines = [json.dumps(told, indent=2)] if isinstance(told, dict) else [_printable(line) for line in told]
    sys.stdout.write("\n".join(lines) + "\n")


def _printable(line: str) -> str:
    return line if line.isprintable() else ascii(line)


def _end_orderly_on_sigterm() -> None:
    """Unwind, so that no half-written copy of the database stays behind."""

    def end(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
