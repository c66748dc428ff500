"""What sandboxes are made of, for an emulated host, which reaches no archive: base image, guest kernel and tools of this
checkout, from this machine's cache (made there where they are not yet), on a disk of its own.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.real_machines import get_base_image, get_boot_files

from atelier.config.settings import load_settings

GUEST_FILES_DISK = "/dev/vdd"


def pack_guest_files(target: Path, *, own_kernel: bool) -> None:
    """An archive with holes; ``unpack_guest_files`` is its other half. ``own_kernel``: the one that Firecracker boots is
    in it, too, which compiles for some ten minutes where it is not in the cache."""
    cache = load_settings().cache_dir.absolute()
    names = sorted(str(path.relative_to(cache)) for path in asyncio.run(_needed(cache, own_kernel)))
    subprocess.run(["tar", "--create", "--sparse", "--file", target, "--directory", cache, *names], check=True)


def unpack_guest_files(cache: str, owner: str) -> str:
    """The script that puts them into ``cache``, a folder of ``owner``'s."""
    return f"tar -x -f {GUEST_FILES_DISK} -C {cache} --no-same-owner && chown -R {owner}:{owner} {cache}"


async def _needed(cache: Path, own_kernel: bool) -> set[Path]:
    image = await get_base_image()
    boots = [await get_boot_files(), *([await get_boot_files(own_kernel=True)] if own_kernel else [])]
    files = {file for boot in boots for file in (boot.kernel, boot.initramfs, boot.tools)}
    return {*files, image.path, *_small_files(cache)}


def _small_files(cache: Path) -> Iterator[Path]:
    """All manifests, one whose file is not there counts for nothing; and what initramfs are packed of, without which a
    kernel of our own is taken for spoilt."""
    for folder in ("images", "kernel", "tools"):
        yield from (cache / folder).glob("*.json")
    yield from (cache / "kernel").glob("parts-*")
