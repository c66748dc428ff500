"""The image cache on disk: keys, content hashes, and how a finished file gets its name.

Called by the builders of this room. A file of the cache is written under a temporary name beside its place, made
read-only and renamed, so whoever finds a name finds it whole; a published file is never rewritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path

from atelier.host.files import disk_full, disk_full_as_error, free_bytes, write_atomically
from atelier.model.errors import AtelierError, CommandError, DiskFullError, ImageBuildError

KEY_DIGITS = 16
_MESSAGE_CHARACTERS = 2000


def key_of(*parts: object) -> str:
    """A key for a build from everything that its result depends on (JSON values), as 16 hex digits."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_DIGITS]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(directory: Path, *, pattern: str = "*") -> str:
    """SHA-256 over names, permissions, link targets and contents of a folder; times and owners do not count.

    ``pattern`` limits it to files of such names (folders are then left out).
    """
    digest = hashlib.sha256()
    for path in sorted(directory.rglob(pattern)):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and pattern != "*":
            continue
        name = str(path.relative_to(directory)).encode()
        digest.update(b"%d %s %o " % (len(name), name, found.st_mode))
        if stat.S_ISLNK(found.st_mode):
            digest.update(str(path.readlink()).encode())
        elif stat.S_ISREG(found.st_mode):
            digest.update(hash_file(path).encode())
    return digest.hexdigest()


def check_room(folder: Path, needed_mib: int, doing: str) -> None:
    """Raises DiskFullError if less is free below ``folder`` (made if absent); ``doing`` as for ``work_folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    free_mib = free_bytes(folder) // (1024 * 1024)
    if free_mib < needed_mib:
        raise DiskFullError(
            f"{doing} needs {needed_mib} MiB in {folder}, {free_mib} MiB are free",
            hint="free some space, or choose another folder with ATELIER_CACHE_DIR",
        )


@contextlib.contextmanager
def work_folder(parent: Path, doing: str) -> Generator[Path, None, None]:
    """A temporary folder inside ``parent`` (so that a rename out of it is atomic), removed at the end.

    ``doing`` completes "no space left while ...": a full disk becomes DiskFullError.
    """
    with disk_full_as_error(doing):
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".building-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_left_over_work(parent: Path) -> None:
    """Remove what killed builds left in ``parent``. Only under the lock that its builds hold."""
    for folder in parent.glob(".building-*"):
        shutil.rmtree(folder, ignore_errors=True)


def publish(temporary: Path, final: Path) -> Path:
    """Give a finished file or folder its name; if that exists already it stays as it is. Returns ``final``."""
    if final.exists():
        return final
    if temporary.is_file():
        temporary.chmod(0o444)
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Else a power cut could leave the name with a file that was never written.
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    temporary.rename(final)
    return final


def read_manifest(path: Path) -> dict[str, object] | None:
    """A manifest, or None if there is none or it is spoilt."""
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None  # pyright: ignore[reportUnknownVariableType]


def write_manifest(path: Path, manifest: dict[str, object]) -> None:
    write_atomically(path, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode(), mode=0o444)


def as_build_error(doing: str, error: CommandError) -> AtelierError:
    """A failed command of a build as DiskFullError or ImageBuildError; ``doing`` is like "building the image base"."""
    if "No space left on device" in error.message or "Disk quota exceeded" in error.message:
        return disk_full(doing)
    # The command line may hold a whole script; what the program said last is at the end.
    return ImageBuildError(f"{doing} failed: {error.message[-_MESSAGE_CHARACTERS:]}", hint=error.hint)
