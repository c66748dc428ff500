"""Debian's archive as this machine reaches it: package lists and downloads in a folder of our own.

Called by the kernel and tools builders and by the root file system builder, which passes the same sources and
connection settings on. Works for an ordinary user and on a machine whose own package lists were never fetched; it
installs nothing and never touches apt's own folders.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from atelier.drivers.images.apt_sources import PackageSource, find_debian_sources
from atelier.host import command
from atelier.host.file_lock import hold_lock
from atelier.model.errors import CommandError, HostError, ImageBuildError
from atelier.model.image import BuildProgress, ProgressReporter

_LISTS_FRESH_SECONDS = 6 * 3600
_UPDATE_SECONDS = 300.0
_DOWNLOAD_SECONDS = 900.0
_QUERY_SECONDS = 60.0


class DebianArchive:
    """``directory`` is ours alone, inside the cache: sources, package lists and downloaded packages."""

    def __init__(self, directory: Path, suite: str, architecture: str, *, apt_directory: Path):
        self._directory = directory
        self._suite = suite
        self._architecture = architecture
        self._apt_directory = apt_directory
        if '"' in str(directory):
            raise HostError(f"the cache folder's name must not contain a quotation mark: {directory}")

    @property
    def _configuration(self) -> Path:
        return self._directory / "apt.conf"

    async def find_sources(self) -> list[PackageSource]:
        """Debian's own sources among the machine's: by suite and component, then by the Origin that apt has verified.

        Raises HostError (``no_debian_sources``).
        """
        candidates = find_debian_sources(self._apt_directory, self._suite)
        origins = await _known_origins(["apt-get"])
        return [
            source
            for source in candidates
            if origins.get((source.uri.rstrip("/"), source.suite), "Debian") in ("Debian", "")
        ]

    async def connection_settings(self) -> list[str]:
        """The machine's own apt settings about fetching (proxies, certificates, time-outs), as configuration lines.

        They may hold a proxy's password: never leave them in an image.
        """
        result = await command.run(
            ["apt-config", "dump", "Acquire"], timeout_seconds=_QUERY_SECONDS, package_hint="apt"
        )
        lines = result.stdout.decode(errors="replace").splitlines()
        wanted = re.compile(r'^Acquire::((https?|ftp|Retries|Check-\S+|ForceIPv\d|Max-\S+|Queue-Mode)\b\S*) ".+";$')
        return [line for line in lines if wanted.match(line)]

    async def update(self, report: ProgressReporter) -> None:
        """Have package lists of the last hours. Raises ImageBuildError with apt's words, HostError as find_sources."""
        async with hold_lock(self._directory / "lock"):
            sources = await self.find_sources()
            rendered = "\n".join(source.render() for source in sources)
            stamp = self._directory / "updated"
            sources_file = self._directory / "sources.list.d" / "debian.sources"
            if (
                stamp.exists()
                and time.time() - stamp.stat().st_mtime < _LISTS_FRESH_SECONDS
                and sources_file.exists()
                and sources_file.read_text() == rendered
            ):
                return
            report(BuildProgress("download", "fetching Debian's package lists"))
            stamp.unlink(missing_ok=True)
            self._write_configuration(rendered)
            try:
                await command.run([*self._apt_get, "update"], timeout_seconds=_UPDATE_SECONDS, package_hint="apt")
            except CommandError as error:
                raise ImageBuildError(
                    f"Debian's package lists could not be fetched: {error.message}",
                    hint="check the network and the sources in /etc/apt with: apt-get update",
                ) from error
            await self._refuse_foreign_origins()
            stamp.touch()

    async def get_dependency(self, package: str, pattern: str) -> str:
        """The one dependency of a metapackage whose name matches ``pattern``. Raises ImageBuildError."""
        result = await command.run(
            ["apt-cache", f"--config-file={self._configuration}", "depends", "--important", package],
            timeout_seconds=_QUERY_SECONDS,
            package_hint="apt",
        )
        for line in result.stdout.decode(errors="replace").splitlines():
            relation, _, name = line.strip().partition(": ")
            if relation.endswith("Depends") and re.fullmatch(pattern, name):
                return name
        raise ImageBuildError(f"the Debian package {package} depends on nothing that matches {pattern}")

    async def check_packages(self, packages: Sequence[str]) -> None:
        """Raises ImageBuildError that names the packages which the archive has not got: in seconds, where a build would
        take half a minute to come to it. ``update`` comes first."""
        if not packages:
            return
        try:
            result = await command.run(
                ["apt-cache", f"--config-file={self._configuration}", "show", "--no-all-versions", *packages],
                timeout_seconds=_QUERY_SECONDS,
                package_hint="apt",
            )
            shown = result.stdout.decode(errors="replace")
        except CommandError:
            shown = ""  # it fails only if it knows none of them
        found = set(re.findall(r"^Package: (\S+)$", shown, re.MULTILINE))
        # A recipe may ask for a version, a suite or an architecture: name=1.0, name/suite, name:any.
        missing = [package for package in packages if re.split("[=/:]", package)[0] not in found]
        if missing:
            raise ImageBuildError(
                f"Debian {self._suite} has no package {', '.join(missing)}",
                hint="correct the image's recipe; apt-cache search finds packages by words",
            )

    async def download(self, packages: Sequence[str], directory: Path, report: ProgressReporter) -> list[Path]:
        """Fetch packages, verified by apt, into ``directory`` (made; must be empty). ``update`` comes first.

        Raises ImageBuildError if a package is missing or cannot be fetched.
        """
        directory.mkdir(parents=True, exist_ok=True)
        seen = 0

        def follow(line: str) -> None:
            nonlocal seen
            if line.startswith("Get:"):
                seen += 1
                words = line.split()
                name = words[4] if len(words) > 4 else ""
                report(BuildProgress("download", f"downloading {name}", min(1.0, seen / len(packages))))

        try:
            await command.run(
                [*self._apt_get, "download", *packages],
                timeout_seconds=_DOWNLOAD_SECONDS,
                directory=directory,
                on_output=follow,
                package_hint="apt",
            )
        except CommandError as error:
            raise ImageBuildError(
                f"Debian packages could not be downloaded: {error.message}", hint="check the network and try again"
            ) from error
        return sorted(directory.glob("*.deb"))

    async def unpack(self, packages: Sequence[Path], directory: Path) -> None:
        """Unpack the files of packages into ``directory`` without installing anything."""
        directory.mkdir(parents=True, exist_ok=True)
        for package in packages:
            try:
                await command.run(
                    ["dpkg-deb", "--extract", str(package), str(directory)],
                    timeout_seconds=_UPDATE_SECONDS,
                    package_hint="dpkg",
                )
            except CommandError as error:
                raise ImageBuildError(f"{package.name} could not be unpacked: {error.message}") from error

    @property
    def _apt_get(self) -> list[str]:
        return ["apt-get", f"--config-file={self._configuration}", "--quiet=1"]

    def _write_configuration(self, sources: str) -> None:
        state = self._directory / "state"
        for folder in ("state/lists/partial", "cache/archives/partial", "sources.list.d", "preferences.d"):
            (self._directory / folder).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (self._directory / "sources.list.d" / "debian.sources").write_text(sources)
        # The machine's own settings are read before this file; its hooks and pins are not wanted here. APT::Sandbox:
        # as root apt would fetch as user _apt, who may not enter the cache folder.
        self._configuration.write_text(
            f"""\
#clear APT::Update;
#clear DPkg;
#clear Acquire::IndexTargets;
Acquire::Languages "none";
Acquire::IndexTargets::deb::Packages::MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
Acquire::IndexTargets::deb::Packages::flatMetaKey "Packages";
Acquire::IndexTargets::deb::Packages::ShortDescription "Packages";
Acquire::IndexTargets::deb::Packages::Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
Acquire::IndexTargets::deb::Packages::flatDescription "$(RELEASE) Packages";
Acquire::IndexTargets::deb::Packages::Optional "no";
APT::Architecture "{self._architecture}";
APT::Architectures {{ "{self._architecture}"; }};
APT::Sandbox::User "root";
Dir::State "{state}";
Dir::State::lists "lists/";
Dir::State::status "{state / "status"}";
Dir::Cache "{self._directory / "cache"}";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{self._directory / "sources.list.d"}";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "{self._directory / "preferences.d"}";
"""
        )

    async def _refuse_foreign_origins(self) -> None:
        for (uri, suite), origin in (await _known_origins(self._apt_get)).items():
            if origin not in ("Debian", ""):
                raise ImageBuildError(
                    f"{uri} {suite} says that it is by {origin}, not Debian",
                    hint="give that source a suite name of its own in /etc/apt, or disable it while images are built",
                )


async def _known_origins(apt_get: Sequence[str]) -> dict[tuple[str, str], str]:
    """(archive, suite) -> signed Origin, "" where apt has not fetched the archive yet."""
    result = await command.run(
        [*apt_get, "indextargets", "--format", "$(REPO_URI)|$(RELEASE)|$(ORIGIN)", "Created-By: Packages"],
        timeout_seconds=_QUERY_SECONDS,
        package_hint="apt",
    )
    found: dict[tuple[str, str], str] = {}
    for line in result.stdout.decode(errors="replace").splitlines():
        uri, _, rest = line.partition("|")
        suite, _, origin = rest.partition("|")
        found[uri.rstrip("/"), suite] = "" if origin.startswith("$(") else origin
    return found
