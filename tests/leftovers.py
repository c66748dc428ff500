"""What sandboxes leave on a host: looked for in ``/proc``, in the folders of an installation and in its database."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path

from tests.footprint import paths_naming, processes_naming

KINDS = ("processes", "sockets", "files", "volumes", "rows")
_OWN = ("bases", "gateway.lock")
_VOLUME_SUFFIXES = (".qcow2", ".fake.json")


def traces_of(folder: Path, sandbox_id: str) -> list[str]:
    """All that names one sandbox, below ``folder`` and among the processes, as ``kind: what``."""
    return [
        *(f"processes: {line}" for line in processes_naming(sandbox_id)),
        *(_told(path) for path in paths_naming(sandbox_id, folder / "data", folder / "run")),
        *_rows(folder, f"sandboxes WHERE id = '{sandbox_id}'"),
        *_rows(folder, f"sagas WHERE subject_id = '{sandbox_id}'"),
    ]


def leftovers(folder: Path) -> list[str]:
    """What an installation without sandboxes, whose manager runs, should not hold, as ``kind: what``. Its database,
    key, logs and the images that disks stood over are its own; so is one gateway at the most."""
    processes = processes_naming(str(folder))
    gateways = [line for line in processes if "-m atelier.gateway " in line]
    run_parts = (path for part in ("sandboxes", "channels") for path in (folder / "run").glob(f"*/{part}/*"))
    data_parts = (path for part in ("volumes", "consoles") for path in (folder / "data" / part).iterdir())
    return [
        *(f"processes: {line}" for line in processes if line not in gateways),
        *(f"processes: {line}" for line in gateways[1:]),
        *(_told(path) for path in (*run_parts, *data_parts) if path.name not in _OWN),
        *_rows(folder, "sandboxes"),
        *_rows(folder, "sagas"),
    ]


def count_kinds(found: list[str]) -> dict[str, int]:
    """How many there are of each of ``KINDS``."""
    counts = Counter(each.partition(":")[0] for each in found)
    return {kind: counts[kind] for kind in KINDS}


def _told(path: Path) -> str:
    if path.is_socket():
        kind = "sockets"
    elif path.name.endswith(_VOLUME_SUFFIXES):
        kind = "volumes"
    else:
        kind = "files"
    return f"{kind}: {path}"


def _rows(folder: Path, of: str) -> list[str]:
    database = sqlite3.connect(f"file:{folder / 'data' / 'atelier.db'}?mode=ro", uri=True)
    try:
        (count,) = database.execute(f"SELECT count(*) FROM {of}").fetchone()
    finally:
        database.close()
    return [f"rows: one of {of}"] * count
