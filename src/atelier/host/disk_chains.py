"""Which files a disk consists of, and that it may.

Called by storage and by the manager's backup. A VMM that was broken out of can write what it likes into the header of its
own volume and layers. So a name has to be earned: these may stand over layers of the same sandbox (its id is in their
names) and images; the disk of a snapshot that it was made from is reached under such a name, too. Only snapshot disks,
which no VMM writes, may name others'.
"""

from __future__ import annotations

import os
import re
import stat

from atelier.host.disk_files import find_backing, missing_disk_file
from atelier.model.errors import HostError
from atelier.model.layout import DiskLayout
from atelier.model.machine import DiskFile

LONGEST_CHAIN = 8
"""Files of one disk, the one that is written to included."""
_CONTENT_NAME = re.compile(r"[a-z0-9][a-z0-9-]*-[0-9a-f]{16}\.ext4")
"""How an image's file is named in the cache."""


def chain_below(layout: DiskLayout, file: DiskFile, owner: str) -> tuple[DiskFile, ...]:
    """What ``file`` stands over, nearest first: layers of its own, then what others stand over, too. ``owner``: the
    sandbox whose volume or layer it is; empty for the disk of a snapshot.

    Raises HostError (``disk_file_missing``, ``disk_file_damaged``).
    """
    chain: list[DiskFile] = []
    lower = file
    while found := find_backing(lower):
        if len(chain) == LONGEST_CHAIN - 1:
            raise HostError(f"{file.path} has a chain of more than {LONGEST_CHAIN} files", code="disk_file_damaged")
        _check(layout, found, owner)
        if layout.is_origin(found.path):
            owner = ""
        chain.append(found)
        lower = found
    if chain and layout.is_layer(chain[-1].path):
        raise HostError(f"{file.path} stands over no image in the end", code="disk_file_damaged")
    return tuple(chain)


def _check(layout: DiskLayout, file: DiskFile, owner: str) -> None:
    try:
        found = file.path.lstat()
    except FileNotFoundError as error:
        raise missing_disk_file(file.path) from error
    folder, name = file.path.parent, file.path.name
    is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    is_read_only = not found.st_mode & 0o222
    if owner and folder == layout.layers:
        # One that is just being frozen may still be written to.
        earned = is_ours and file.format == "qcow2" and name.startswith(f"{owner}-")
    elif folder == layout.origins:
        earned = is_ours and is_read_only and not owner
    else:
        # Volumes stood over the cache itself before images were kept.
        earned = is_ours and is_read_only and (folder == layout.bases or bool(_CONTENT_NAME.fullmatch(name)))
    if not earned:
        raise HostError(
            f"{file.path} is named as what a disk stands over, and is none of its layers and no image's file",
            code="disk_file_damaged",
            hint="the disk was tampered with; do not use it",
        )
