"""What ``atelier host`` has made on this machine, written down before it is made: so that an interrupted init goes on, and
uninstall removes exactly that.

A JSON file that root alone can write, in a folder that is root's: what stands here is done as root.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from atelier.host.files import lock_folder, write_atomically
from atelier.host_setup.host import Host
from atelier.model.errors import HostError

FOLDER = Path("/var/lib/atelier")
FILE = FOLDER / "host-state.json"
_VERSION = 1

Record = dict[str, Any]


@dataclass(slots=True)
class Entry:
    """``area``: which command made it; ``kind`` and ``key`` say what it is, ``record`` what its undoing wants to know.
    ``is_done`` false: it was begun, and is perhaps there or half there."""

    area: str
    kind: str
    key: str
    record: Record = field(default_factory=dict[str, Any])
    is_done: bool = False


class Journal:
    """Entries in the order in which they were made. Each change of it is on disk when the call returns."""

    def __init__(self, file: Path, entries: list[Entry]) -> None:
        self._file = file
        self.entries = entries

    @staticmethod
    def open(host: Host) -> Journal:
        """Raises HostError (``host_state_damaged``)."""
        file = host.path(FILE)
        try:
            told = json.loads(file.read_text())
            if told["version"] != _VERSION:
                raise ValueError(f"version {told['version']}")
            entries = [Entry(**each) for each in cast("list[dict[str, Any]]", told["entries"])]
        except FileNotFoundError:
            entries = []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise HostError(
                f"{FILE} cannot be used: {error}",
                code="host_state_damaged",
                hint="it says what Atelier has made on this host; bring it back from a backup, or move it away and remove "
                "by hand what it lists",
            ) from error
        return Journal(file, entries)

    def find(self, kind: str, key: str) -> Record | None:
        """None: it is not of Atelier's making."""
        entry = self._find(kind, key)
        return None if entry is None else entry.record

    def note(self, area: str, kind: str, key: str, record: Record) -> None:
        """Before it is made; again when more is known."""
        entry = self._find(kind, key)
        if entry is None:
            entry = Entry(area, kind, key)
            self.entries.append(entry)
        entry.record, entry.is_done = record, False
        self._write()

    def finish(self, kind: str, key: str) -> None:
        entry = self._find(kind, key)
        if entry is not None:
            entry.is_done = True
            self._write()

    def remove(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self._write()

    def lock(self) -> Any:
        """One ``atelier host`` at a time changes this machine. A context; raises AlreadyRunningError."""
        self._file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        return lock_folder(self._file.with_name("host-state.lock"))

    def close(self) -> None:
        """With nothing left in it, it goes, and its folder if that is empty."""
        if self.entries:
            return
        for name in (self._file, self._file.with_name("host-state.lock")):
            name.unlink(missing_ok=True)
        if self._file.parent.is_dir() and not any(self._file.parent.iterdir()):
            self._file.parent.rmdir()

    def _find(self, kind: str, key: str) -> Entry | None:
        return next((each for each in self.entries if (each.kind, each.key) == (kind, key)), None)

    def _write(self) -> None:
        self._file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        told = {"version": _VERSION, "entries": [asdict(each) for each in self.entries]}
        write_atomically(self._file, json.dumps(told, indent=1).encode() + b"\n")
