"""The configuration file's place on the host, and what is filled in of one that says less than a production host wants."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from atelier.config.file import parse_config
from atelier.host_setup.changes import THERE, FileChange, Look, Note, missing
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Record


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """Only root and Atelier's user read it: it may hold secrets. An administrator edits it in place: ``derived_from`` is what
    the host's file said when ``text`` was made of it, empty where ``text`` comes from elsewhere."""

    path: str
    text: str
    user: str
    derived_from: str = ""

    kind: ClassVar[str] = "file"

    @property
    def key(self) -> str:
        return self.path

    async def look(self, host: Host, own: Record | None) -> Look:
        present = host.read(self.path)
        if present == self.text and own is None:
            return THERE
        if own is not None and present == self.derived_from != self.text:
            return missing(f"complete {self.path}")
        return await self._file.look(host, own)

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        await self._file.apply(host, own, note)

    @property
    def _file(self) -> FileChange:
        return FileChange(self.path, self.text.encode(), 0o640, "root", self.user)


def complete_config(text: str, values: Mapping[str, str], source: Path) -> str:
    """``text`` with each of ``values`` (key to TOML) that it does not set, below its section's heading; all else, comments
    too, stays as it is written. Raises what ``parse_config`` raises."""
    present = parse_config(text, source).values
    by_section: dict[str, list[str]] = {}
    for path, value in values.items():
        if path not in present:
            section, _, name = path.partition(".")
            by_section.setdefault(section, []).append(f"{name} = {value}\n")
    for section, lines in by_section.items():
        heading = re.search(rf"^[ \t]*\[[ \t]*{section}[ \t]*\][^\n]*(?:\n|$)", text, re.MULTILINE)
        if heading is not None:
            before = text[: heading.end()]
            text = before + ("" if before.endswith("\n") else "\n") + "".join(lines) + text[heading.end() :]
        elif any(each.startswith(f"{section}.") for each in present):
            # Written as dotted keys, above all headings: more of the same.
            text = "".join(f"{section}.{line}" for line in lines) + text
        else:
            text = (
                text.rstrip("\n") + f"\n\n[{section}]\n" + "".join(lines) if text else f"[{section}]\n" + "".join(lines)
            )
    return text
