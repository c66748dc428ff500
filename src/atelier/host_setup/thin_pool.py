"""The thin pool that sandboxes' disks lie in, and how it grows by itself.

Called by ``atelier host storage`` and ``init``. The volume group is the administrator's: it is used, never made here, and
no disk is taken. What is there is looked at and kept; only what is missing is added.
"""

from __future__ import annotations

import re
from pathlib import Path

from atelier.host import command
from atelier.host.files import write_atomically
from atelier.host.lvm import PROFILE, ThinPool
from atelier.model.errors import HostError

_PROFILES = Path("/etc/lvm/profile")
_CHUNK = "64k"
"""The smallest: a clone that writes one byte to a block gets a block of its own."""
_PROFILE_TEXT = """\
# Written by: atelier host storage. dmeventd extends the pool from here on, as long as the volume group has room.
activation {
\tthin_pool_autoextend_threshold=80
\tthin_pool_autoextend_percent=20
}
"""
_SECONDS = 300.0


async def ensure_thin_pool(group: str, pool: str, *, size_percent: int = 90) -> None:
    """Have it, with this share of what the group has free, zeroing its blocks and telling at once when it is full.

    ``size_percent`` below 100 leaves room to extend it, its metadata too. Raises HostError (``volume_group_missing``,
    ``thin_pool_not_zeroing``; ``thin_pool_missing`` where the name is another volume's), CommandError.
    """
    _PROFILES.mkdir(parents=True, exist_ok=True)
    write_atomically(_PROFILES / f"{PROFILE}.profile", _PROFILE_TEXT.encode(), mode=0o644)
    name = f"{group}/{pool}"
    try:
        await ThinPool(group, pool).look()
    except HostError as error:
        if error.code != "thin_pool_missing" or await _exists(group, pool):
            raise
        # -Zy: a block that is handed out has nothing in it of whose it was before.
        making = ["lvcreate", "--type", "thin-pool", "-Zy", "--chunksize", _CHUNK, "--profile", PROFILE]
        await _run([*making, "-l", f"{size_percent}%FREE", "-n", pool, group])
    # A guest whose write finds no room is halted and goes on later; one that hung instead would be taken for dead.
    await _run(["lvchange", "--errorwhenfull", "y", "--metadataprofile", PROFILE, "--monitor", "y", name])


async def _exists(group: str, name: str) -> bool:
    done = await command.run(["lvs", "--noheadings", "-o", "lv_name", group], package_hint="lvm2")
    return name in re.findall(r"[^\s\[\]]+", done.stdout.decode())


async def _run(arguments: list[str]) -> None:
    await command.run([*arguments, "--quiet"], timeout_seconds=_SECONDS, package_hint="lvm2")
