"""Finds the project's own source files and what they import. Used by the architecture tests alone."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "atelier"


@dataclass(frozen=True)
class Import:
    """One imported name: ``from atelier.host import files`` imports ``atelier.host`` and perhaps ``atelier.host.files``,
    so both stand in ``names``, the longest last."""

    module: str
    names: tuple[str, ...]
    line: int


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path, package: Path = PACKAGE) -> str:
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports_of(path: Path, package: Path = PACKAGE) -> Iterator[Import]:
    """Every import statement, those inside functions and ``if TYPE_CHECKING`` included."""
    name = module_name(path, package)
    parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, (alias.name,), node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                ancestors = parent.split(".")
                base = ".".join(ancestors[: len(ancestors) - node.level + 1])
                source = f"{base}.{source}" if source else base
            for alias in node.names:
                yield Import(name, (source, f"{source}.{alias.name}"), node.lineno)


def tracked_files() -> list[Path]:
    """What git tracks, or would on the next ``git add``; empty outside a git checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listing.returncode != 0:
        return []
    return sorted(path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file())
