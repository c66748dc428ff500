"""What the CLI prints: tables, JSON, errors. Nothing that a guest chose reaches the terminal unescaped through here.

Called by all commands. Raw program output (``exec``, ``shell``) does not pass here: like ssh, they show what the
program writes, as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from atelier.model.errors import AtelierError

if TYPE_CHECKING:
    from pydantic import BaseModel


def printable(text: str) -> str:
    """``text`` on one line, with every character escaped that a terminal would obey or hide: control characters,
    escapes, direction marks, line breaks."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def printable_block(text: str) -> str:
    """As ``printable``, but line ends and tabs stay; a carriage return before a line end is dropped."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(printable(cell) for cell in line.split("\t")) for line in lines)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii") if char != "\\" else char


def print_line(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def print_note(text: str) -> None:
    """For people, beside the result: to stderr."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def print_json(value: object) -> None:
    print_line(json.dumps(value, indent=2, ensure_ascii=False))


def print_model(model: BaseModel) -> None:
    print_line(model.model_dump_json(indent=2))


def print_error(error: AtelierError, *, as_json: bool = False) -> None:
    """``error: ...`` and ``hint: ...`` to stderr; as JSON in the API's form."""
    if as_json:
        print_note(json.dumps({"code": error.code, "message": error.message, "hint": error.hint}, ensure_ascii=False))
        return
    print_note(f"error: {printable_block(error.message)}")
    if error.hint:
        print_note(f"hint: {printable_block(error.hint)}")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; never cut, so that every cell can be copied."""
    cells = [list(headings), *([printable(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    for row in cells:
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    shown = [(label, printable(value)) for label, value in fields if value]
    width = max((len(label) for label, _ in shown), default=0)
    for label, value in shown:
        print_line(f"{label.ljust(width)}  {value}")


def show_mebibytes(mib: int) -> str:
    return f"{mib // 1024} GiB" if mib >= 1024 and mib % 1024 == 0 else f"{mib} MiB"


def show_bytes(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def show_duration(seconds: float) -> str:
    """The two largest units that fit: ``45s``, ``20m``, ``1h 20m``, ``3d 4h``; what is smaller is cut off."""
    rest = max(0, int(seconds))
    units: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, rest = divmod(rest, size)
        units.append(f"{count}{unit}" if count else "")
    first = next((place for place, unit in enumerate(units) if unit), len(units) - 1)
    return " ".join(unit for unit in units[first : first + 2] if unit) or "0s"


def show_age(moment: datetime, now: datetime | None = None) -> str:
    """How long ago, in the largest unit that fits: ``42s``, ``5m``, ``3h``, ``12d``."""
    seconds = max(0, int(((now or datetime.now(UTC)) - moment).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
