"""Which of the machine's package sources are Debian's own, in deb822 form.

Called by ``apt.DebianArchive``. Pure text work: it reads apt's source files and never fetches anything. All of the
machine's sources must never be used, since third-party ones would put their packages into images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from atelier.model.errors import HostError

_ONE_LINE_OPTIONS = {
    "signed-by": "Signed-By",
    "trusted": "Trusted",
    "check-valid-until": "Check-Valid-Until",
    "check-date": "Check-Date",
    "by-hash": "By-Hash",
    "allow-insecure": "Allow-Insecure",
}
_KEPT_FIELDS = tuple(_ONE_LINE_OPTIONS.values())
_POCKETS = ("", "-updates", "-security")


@dataclass(frozen=True, slots=True)
class PackageSource:
    """One archive: ``options`` are deb822 fields such as Signed-By, continuation lines included."""

    uri: str
    suite: str
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def render(self) -> str:
        fields = [
            ("Types", "deb"),
            ("URIs", self.uri),
            ("Suites", self.suite),
            ("Components", " ".join(self.components)),
            *self.options,
        ]
        return "".join(f"{name}: {value}\n" for name, value in fields)


def find_debian_sources(apt_directory: Path, suite: str) -> list[PackageSource]:
    """Debian's own sources for ``suite``, its updates and security pockets, component main.

    ``apt_directory`` is ``/etc/apt``. Other components, other suites (backports too) and anything that does not look
    like Debian's archive are left out; the archive's signed Origin is checked once it was fetched
    (``apt.DebianArchive.update``). Raises HostError (``no_debian_sources``) if none is left.
    """
    files = [apt_directory / "sources.list"]
    folder = apt_directory / "sources.list.d"
    if folder.is_dir():
        files += sorted(path for path in folder.iterdir() if path.suffix in (".list", ".sources"))
    wanted_suites = {suite + pocket for pocket in _POCKETS}
    found: list[PackageSource] = []
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except (FileNotFoundError, PermissionError):
            continue
        for source in parse_deb822(text) if file.suffix == ".sources" else parse_one_line(text):
            if source.suite in wanted_suites and "main" in source.components:
                main_only = PackageSource(source.uri, source.suite, ("main",), source.options)
                if main_only not in found:
                    found.append(main_only)
    if not any(source.suite == suite for source in found):
        raise HostError(
            f"this machine has no package source for Debian {suite}",
            code="no_debian_sources",
            hint=f"add one for suite {suite}, component main, as /etc/apt/sources.list.d/debian.sources "
            "(see sources.list(5)); images are made from Debian's packages",
        )
    return found


def parse_deb822(text: str) -> list[PackageSource]:
    """Binary-package sources of a ``.sources`` file, one per URI and suite. Source: sources.list(5), deb822(5)."""
    found: list[PackageSource] = []
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(_without_comments(text))):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.split("\n"):
            if line[:1] in (" ", "\t"):
                if name:
                    fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "0") or "deb" not in fields.get("types", "").split():
            continue
        options = tuple((kept, fields[kept.lower()]) for kept in _KEPT_FIELDS if kept.lower() in fields)
        found += [
            PackageSource(uri, suite, tuple(fields.get("components", "").split()), options)
            for uri in fields.get("uris", "").split()
            for suite in fields.get("suites", "").split()
        ]
    return found


def parse_one_line(text: str) -> list[PackageSource]:
    """Binary-package sources of a ``.list`` file. Source: sources.list(5)."""
    found: list[PackageSource] = []
    for line in text.splitlines():
        match = re.match(r"deb(?:\s+\[(?P<options>[^]]*)\])?\s+(?P<rest>[^#]*)", line.strip())
        if match is None:
            continue
        uri, *words = match["rest"].split() or [""]
        if len(words) < 2:
            continue
        given = {word.partition("=")[0].lower(): word.partition("=")[2] for word in (match["options"] or "").split()}
        # A comma separates several values in this form, a blank in the other.
        options = tuple((kept, given[key].replace(",", " ")) for key, kept in _ONE_LINE_OPTIONS.items() if key in given)
        found.append(PackageSource(uri, words[0], tuple(words[1:]), options))
    return found


def _without_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]
