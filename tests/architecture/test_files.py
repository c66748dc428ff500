"""How files are named, how long they are, what they say at their top, and what none of them may name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.architecture.source_files import PACKAGE, ROOT, modules, parse, tracked_files

UNTELLING_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "shared", "base", "core", "misc", "stuff"})
NAMES_WITH_A_REASON = {
    "images/base": "the image is called base",
}
MAX_LINES = 500
MAX_LINES_OF_A_TEST = 700
LONGER_WITH_A_REASON: dict[str, str] = {}
"""Path from the root of the checkout -> why the file is one piece. Shorten the file rather than add to this."""

MACHINE_PATHS = re.compile(
    rb"(?<![\w.$}/-])/(?:work|home/(?!user\b)\w+)/\w+|/tmp/(?:w|tooling|x)/|\.pyenv/versions|/opt/wheels"
)
REGISTRY_HOSTS = re.compile(
    rb"pypi\.org|pythonhosted\.org|registry\.npmjs\.org|(?:deb|security|snapshot)\.debian\.org|static\.crates\.io|proxy\.golang\.org"
    rb"|repo1?\.maven\.org|pkg\.dev"
)
TEXT_THAT_NAMES_THEM = frozenset({"tests/architecture/test_files.py", "src/atelier/config/npm.py"})
"""The patterns themselves, and the one named constant of where npm goes when nobody has told it."""


def own_files() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in tracked_files()]


def test_no_file_has_an_untelling_name() -> None:
    found: set[str] = set()
    for name in own_files():
        parts = Path(name).parts
        for depth, part in enumerate(parts, start=1):
            if Path(part).stem in UNTELLING_NAMES and "/".join(parts[:depth]) not in NAMES_WITH_A_REASON:
                found.add("/".join(parts[:depth]))
    assert not found, f"name these after the thing in them: {sorted(found)}"


def test_no_source_file_is_too_long() -> None:
    lengths = {
        name: len((ROOT / name).read_text().splitlines())
        for name in own_files()
        if name.endswith(".py") and name.split("/")[0] in ("src", "tests", "benchmarks", "scripts")
    }

    def limit(name: str) -> int:
        return MAX_LINES_OF_A_TEST if name.startswith("tests/") else MAX_LINES

    too_long = {
        name: lines for name, lines in lengths.items() if lines > limit(name) and name not in LONGER_WITH_A_REASON
    }
    assert not too_long, f"over {MAX_LINES} lines (a test: {MAX_LINES_OF_A_TEST}), split by subject: {too_long}"
    stale = [name for name in LONGER_WITH_A_REASON if lengths.get(name, 0) <= limit(name)]
    assert not stale, f"no longer too long, take them off the list: {stale}"


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(PACKAGE)) for path in modules() if not (ast.get_docstring(parse(path)) or "").strip()
    ]
    assert not silent, f"without a docstring: {silent}"


def test_no_file_names_a_machine_or_a_registry_host() -> None:
    found: list[str] = []
    for name in own_files():
        if name in TEXT_THAT_NAMES_THEM:
            continue
        for number, line in enumerate((ROOT / name).read_bytes().splitlines(), start=1):
            for pattern in (MACHINE_PATHS, REGISTRY_HOSTS):
                if hit := pattern.search(line):
                    found.append(f"{name}:{number}: {hit.group().decode(errors='replace')}")
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_look_for() -> None:
    assert MACHINE_PATHS.search(b"cd /home/alice/atelier")
    assert MACHINE_PATHS.search(b"path = '/work/main'")
    assert not MACHINE_PATHS.search(b"/home/user/notes.txt")
    assert not MACHINE_PATHS.search(b"$root/work/main")
    assert REGISTRY_HOSTS.search(b"https://deb.debian.org/debian")
    assert not REGISTRY_HOSTS.search(b"Debian's own sources file")


def test_scripts_are_executable() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix]
    scripts.append(ROOT / ".ci" / "run")
    plain = [str(path.relative_to(ROOT)) for path in scripts if not path.stat().st_mode & 0o111]
    assert not plain, f"chmod +x: {plain}"
