"""The same work over and over again, and what it costs in the long run: the bounds that both soak tests keep to."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from tests.footprint import gateway_pid, paths_below
from tests.running_manager import LocalInstallation, wait_until

EVENT_BYTES_PER_CYCLE = 8192
"""Each sandbox's events are kept for seven days, 100,000 at the most: that the database may grow by. A dozen of a few
hundred bytes, with their index."""
LOG_BYTES = 8 * 2**20
"""SQLite's log is folded in at 1,000 pages, and its file stays as large as it once was."""
RESIDENT_KIB = {"manager": 3 * 1024, "gateway": 1024}
"""What resident memory may sway by once a program is warm: arenas, garbage that is not collected yet. The gateway has
little of either; one forgotten buffer of a channel (400 KiB) per cycle would be too much after three."""


@dataclass(frozen=True)
class Costs:
    """``objects``: what must not grow by a single one; ``resident_kib`` by process; ``database_bytes`` without its
    log but with what stands in that, ``other_bytes`` all else in data and run folder."""

    objects: dict[str, int]
    resident_kib: dict[str, int]
    database_bytes: int
    log_bytes: int
    other_bytes: int


def measure(installation: LocalInstallation) -> Costs:
    processes = {"manager": installation.manager.process.pid}
    if installation.mode == "local":
        processes["gateway"] = gateway_pid(installation.manager)
    objects = {
        f"descriptors of the {name}": len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in processes.items()
    }
    objects |= {
        f"threads of the {name}": len(list(Path(f"/proc/{pid}/task").iterdir())) for name, pid in processes.items()
    }
    path = installation.manager.data_dir / "atelier.db"
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    for table in ("sandboxes", "sagas", "settings"):
        (objects[f"rows of {table}"],) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
    ((pages,),) = database.execute("PRAGMA page_count").fetchall()
    ((page_bytes,),) = database.execute("PRAGMA page_size").fetchall()
    database.close()
    folders = (installation.manager.data_dir, installation.manager.run_dir)
    files = [each for folder in folders for each in paths_below(folder)]
    others = [each for each in files if not each.name.startswith(path.name)]
    objects["files"] = len(others)
    return Costs(
        objects,
        {name: _resident_kib(pid) for name, pid in processes.items()},
        pages * page_bytes,
        Path(f"{path}-wal").stat().st_size,
        sum(each.lstat().st_blocks * 512 for each in others if each.is_file()),
    )


def _resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def soak(installation: LocalInstallation, warm_up: int, cycles: int) -> None:
    """Create a sandbox, run a program in it and destroy it, ``cycles`` times after ``warm_up`` times; nothing may be
    more in the end."""
    _work(installation, range(warm_up))
    before = measure(installation)
    _work(installation, range(warm_up, warm_up + cycles))

    def has_settled() -> bool:
        """The last connections are closed a moment after their answers."""
        now = measure(installation).objects
        return all(count <= before.objects[name] for name, count in now.items())

    settled = True
    try:
        wait_until(has_settled, 30)
    except AssertionError:
        settled = False
    after = measure(installation)
    print(f"\nafter {warm_up} cycles: {before}\nand {cycles} more: {after}")
    assert settled, (before.objects, after.objects)
    for name, resident_kib in after.resident_kib.items():
        assert resident_kib <= before.resident_kib[name] + RESIDENT_KIB[name], name
    assert after.database_bytes <= before.database_bytes + cycles * EVENT_BYTES_PER_CYCLE
    assert after.log_bytes <= LOG_BYTES
    assert after.other_bytes <= before.other_bytes + 64 * 1024, "logs say little of what goes well"


def _work(installation: LocalInstallation, numbers: range) -> None:
    for number in numbers:
        name = f"cycle-{number}"
        installation.create(name)
        result = installation.call("POST", f"/sandboxes/{name}/run", {"command": ["echo", "at work"]})
        assert result["stdout"] == "at work\n", result
        installation.call("DELETE", f"/sandboxes/{name}?wait=true", expected=204)
