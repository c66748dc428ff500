"""Firecracker and its jailer, put in place from a release: a .tgz (checked by its checksum), or a folder with both.

What is wrong with what is at hand is told before anything is changed; what has to be fetched first is checked then.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from atelier.config.host import Download
from atelier.drivers.vmm.firecracker_version import read_version
from atelier.host_setup.changes import THERE, Look, Note, UndoOptions, digest, foreign, missing, write_file
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Record
from atelier.model.errors import AtelierError, HostError

PROGRAMS = ("firecracker", "jailer")
_RELEASE_MAX_BYTES = 256 * 1024 * 1024
_FETCH_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class FirecrackerChange:
    """``folder``: where both programs go."""

    release: Download
    folder: str = "/usr/local/lib/atelier"

    kind: ClassVar[str] = "firecracker"

    @property
    def key(self) -> str:
        return self.folder

    async def look(self, host: Host, own: Record | None) -> Look:
        present = [name for name in PROGRAMS if host.path(f"{self.folder}/{name}").exists()]
        if own is None and present:
            return foreign(
                f"{self.folder}/{present[0]} is there, and not of Atelier's making",
                f"to use it as it is leave out host.firecracker; else: mv {self.folder}/{present[0]}{{,.before}}",
            )
        if not self._is_remote:
            try:
                programs = await asyncio.to_thread(_read_release, self.release, self._read_local(host))
                version = await self._check(programs)
            except AtelierError as error:
                return foreign(error.message, error.hint)
            wanted = {name: hashlib.sha256(content).hexdigest() for name, content in programs.items()}
            words = f"install Firecracker {version}"
        else:
            wanted = {}
            words = f"fetch and install {self.release.source}"
        if own and len(present) == len(PROGRAMS) and own["source"] == self.release.source:
            now = {name: digest(host.path(f"{self.folder}/{name}")) for name in PROGRAMS}
            if now == (wanted or own["sha256"]):
                return THERE
        return missing(words)

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        if self._is_remote:
            content = await asyncio.to_thread(_fetch, self.release.source)
        else:
            content = self._read_local(host)
        programs = await asyncio.to_thread(_read_release, self.release, content)
        await self._check(programs)
        sums = {name: hashlib.sha256(each).hexdigest() for name, each in programs.items()}
        note({"folder": self.folder, "source": self.release.source, "sha256": sums})
        for name, each in programs.items():
            write_file(host, f"{self.folder}/{name}", each, 0o755, "root", "root")

    @property
    def _is_remote(self) -> bool:
        return "://" in self.release.source

    def _read_local(self, host: Host) -> bytes | Path:
        path = host.path(self.release.source)
        if path.is_dir():
            return path
        try:
            return path.read_bytes()
        except OSError as error:
            raise HostError(
                f"the release {self.release.source} cannot be read: {error.strerror}",
                code="release_missing",
                hint="say another with host.firecracker",
            ) from error

    async def _check(self, programs: Mapping[str, bytes]) -> str:
        """Its version, said by the program itself. Raises VmmError (``firecracker_too_old``,
        ``firecracker_wrong_architecture``, ``firecracker_unusable``)."""
        with tempfile.TemporaryDirectory(prefix="atelier-release-") as folder:
            program = Path(folder) / "firecracker"
            program.write_bytes(programs["firecracker"])
            program.chmod(0o755)
            return str(await read_version(program))


async def undo_firecracker(host: Host, record: Record, options: UndoOptions) -> str:
    for name, sha256 in record["sha256"].items():
        path = host.path(f"{record['folder']}/{name}")
        if path.is_file() and digest(path) != sha256:
            return f"{record['folder']}/{name} was changed since Atelier installed it, and is left"
        path.unlink(missing_ok=True)
    return ""


def _read_release(release: Download, content: bytes | Path) -> dict[str, bytes]:
    """Both programs' bytes. Raises HostError (``release_checksum``, ``release_invalid``)."""
    if isinstance(content, Path):
        found = {name: content / name for name in PROGRAMS}
        if lacking := [name for name, path in found.items() if not path.is_file()]:
            raise _invalid(release, f"there is no {lacking[0]} in it")
        return {name: path.read_bytes() for name, path in found.items()}
    sha256 = hashlib.sha256(content).hexdigest()
    if release.sha256 and sha256 != release.sha256:
        raise HostError(
            f"{release.source} is not what it should be: its checksum is {sha256}, wanted is {release.sha256}",
            code="release_checksum",
            hint="fetch it again; its .sha256.txt stands beside it among Firecracker's releases",
        )
    programs: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                name = Path(member.name).name
                for program in PROGRAMS:
                    # As release-v1.12.0-x86_64/firecracker-v1.12.0-x86_64; beside it lie .debug files and tools.
                    if member.isfile() and name.startswith(f"{program}-v") and not name.endswith(".debug"):
                        opened = archive.extractfile(member)
                        assert opened is not None
                        programs[program] = opened.read(_RELEASE_MAX_BYTES)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _invalid(release, f"it is no archive: {error}") from error
    if lacking := [name for name in PROGRAMS if name not in programs]:
        raise _invalid(release, f"there is no {lacking[0]} in it")
    return programs


def _invalid(release: Download, why: str) -> HostError:
    return HostError(
        f"{release.source} is no release of Firecracker: {why}",
        code="release_invalid",
        hint="a firecracker-v...-x86_64.tgz, or a folder with firecracker and jailer",
    )


def _fetch(url: str) -> bytes:
    """Raises HostError (``release_missing``)."""
    try:
        with urllib.request.urlopen(url, timeout=_FETCH_SECONDS) as answer:  # noqa: S310  https, says the setting
            content = answer.read(_RELEASE_MAX_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        raise HostError(
            f"{url} cannot be fetched: {error}",
            code="release_missing",
            hint="fetch it by hand, and name the file with host.firecracker",
        ) from error
    if len(content) > _RELEASE_MAX_BYTES:
        raise HostError(f"{url} is larger than any release", code="release_invalid")
    return content
