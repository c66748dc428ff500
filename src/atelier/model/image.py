"""What an image is: a root file system that sandboxes start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Image:
    """A built image. ``id`` is ``<name>-<first 16 hex digits of its key>``; the key is the hash of recipe, suite,
    architecture and format. ``path`` is a read-only raw ext4 file of ``size_mib`` (sparse: ``stored_bytes`` on disk)."""

    id: str
    name: str
    path: Path
    size_mib: int
    stored_bytes: int
    built_at: datetime


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """One report of long work. ``fraction`` runs from 0.0 to 1.0, or is None while it cannot be known."""

    phase: str
    message: str
    fraction: float | None = None


ProgressReporter = Callable[[BuildProgress], None]
"""Called from any thread of the builder; must return at once."""
