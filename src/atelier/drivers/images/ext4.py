"""Turns a folder into an ext4 image, without mounting anything and without being root.

Called by the builders of base images and tools images. Owners come out right for an ordinary user too: mke2fs then
runs in a user namespace of its own, in which the folder's files belong to whom they shall belong in the guest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid5

from atelier.drivers.images.cache import as_build_error
from atelier.host import command
from atelier.model.errors import CommandError

_MIB = 1024 * 1024
_MKE2FS_SECONDS = 600.0
_UUID_SPACE = UUID("d9c3f6a4-8d0f-4c7e-9f6b-0b8b3c1f6a52")
# Any fixed moment will do; this one is 2024-01-01.
FIXED_TIME_SECONDS = 1704067200


@dataclass(frozen=True, slots=True)
class Ext4Format:
    """``label`` at most 16 bytes. ``features`` and ``extended`` are mke2fs -O and -E words."""

    label: str
    features: tuple[str, ...]
    extended: tuple[str, ...] = ()
    further: tuple[str, ...] = ()


# Inode tables need no zeroing: the file is sparse and new, which mke2fs learns by discarding it first. Otherwise the
# guest's kernel would write them out in the background of every new sandbox.
WRITABLE_ROOT = Ext4Format(
    label="atelier-root",
    features=("has_journal", "^metadata_csum_seed"),
    extended=("discard", "lazy_itable_init=0", "lazy_journal_init=1"),
    further=("-m", "1", "-J", "size=32"),
)
READ_ONLY_TOOLS = Ext4Format(
    label="atelier-tools",
    features=("^has_journal", "^resize_inode", "^metadata_csum_seed"),
    extended=("discard", "lazy_itable_init=0"),
    further=("-m", "0"),
)


def user_namespace(*, whole_range: bool) -> list[str]:
    """Words before a command line so that it runs as root of a user namespace; none if this process is root.

    ``whole_range``: the user's subordinate uids are uids 1 and up inside (needs newuidmap and entries in /etc/subuid);
    else this user alone, as root.
    """
    if os.geteuid() == 0:
        return []
    ranges = ["--map-auto"] if whole_range else []
    return ["unshare", "--user", "--map-root-user", *ranges, "--"]


async def make_ext4(
    tree: Path, image: Path, size_mib: int, form: Ext4Format, *, identity: str, namespace: Sequence[str]
) -> None:
    """Write ``image``, a sparse raw file of ``size_mib``, with the content of ``tree``.

    ``identity`` decides the file system's UUID and its hash seed, so the same identity gives the same. ``namespace``
    comes from ``user_namespace``. Raises ImageBuildError, DiskFullError.
    """
    uuid = str(uuid5(_UUID_SPACE, identity))
    features = ",".join(form.features)
    with image.open("xb") as file:
        file.truncate(size_mib * _MIB)
    extended = ",".join([*form.extended, f"hash_seed={uuid}", "root_owner=0:0"])
    arguments = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", form.label, "-U", uuid, *form.further]
    try:
        await command.run(
            [*namespace, *arguments, "-O", features, "-E", extended, "-d", str(tree), str(image)],
            timeout_seconds=_MKE2FS_SECONDS,
            environment={"E2FSPROGS_FAKE_TIME": str(FIXED_TIME_SECONDS), **SYSTEM_PATH},
            package_hint="e2fsprogs",
        )
    except CommandError as error:
        raise as_build_error(f"making the file system {image.name}", error) from error


# mke2fs, debugfs and the like lie where an ordinary user's PATH does not look.
SYSTEM_PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
