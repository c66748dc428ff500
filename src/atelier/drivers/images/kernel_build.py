"""A guest kernel compiled from Debian's source package, with everything that a sandbox needs built in and no modules.

Called by ``kernel``. It is compiled inside a tree of packages of its own, which is thrown away, so the machine needs no
compiler and the same source gives the same kernel everywhere. Some ten processor minutes; an emulated guest boots in
half the time, and Firecracker takes the kernel as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from atelier.drivers.images.apt import DebianArchive
from atelier.drivers.images.cache import as_build_error, check_room
from atelier.drivers.images.ext4 import SYSTEM_PATH
from atelier.drivers.images.mmdebstrap import check_user_namespace, mmdebstrap
from atelier.host import command
from atelier.model.errors import CommandError, ImageBuildError
from atelier.model.image import BuildProgress, ProgressReporter

_BUILD_SECONDS = 2 * 3600.0
_NEEDED_MIB = 4096
"""The source unpacked and its objects."""
_OBJECTS = 2000
"""About as many files are compiled; for the progress bar."""
_COMPILED = re.compile(r" +(CC|AS|LD|AR) ")
_UNPACKING, _COMPILING = "atelier: unpacking", "atelier: compiling"
_OUTPUT = "built"


@dataclass(frozen=True, slots=True)
class SourceRecipe:
    """``directory`` holds build.sh and fragment. ``metapackage`` depends on the source package, by ``pattern``;
    ``packages`` compile it."""

    directory: Path
    metapackage: str
    pattern: str
    packages: tuple[str, ...]

    @property
    def script(self) -> Path:
        return self.directory / "build.sh"

    @property
    def fragment(self) -> Path:
        return self.directory / "fragment"


async def build_kernel(
    recipe: SourceRecipe, suite: str, architecture: str, archive: DebianArchive, work: Path, report: ProgressReporter
) -> tuple[Path, str]:
    """(the ELF kernel inside ``work``, its release). ``archive.update`` comes first.

    Raises ImageBuildError with the end of the compiler's output, HostError, MissingProgramError, DiskFullError.
    """
    doing = "building the guest kernel"
    check_room(work, _NEEDED_MIB, doing)
    check_user_namespace()
    source = await archive.get_dependency(recipe.metapackage, recipe.pattern)
    sources = "\n".join(each.render() for each in await archive.find_sources())
    hooks = [
        f"upload {recipe.fragment} /fragment",
        f"upload {recipe.script} /build.sh",
        'chroot "$1" sh /build.sh',
        f"copy-out /{_OUTPUT} {work}",
    ]
    words = mmdebstrap(
        suite,
        architecture,
        [*recipe.packages, source],
        await archive.connection_settings(),
        output_format="null",
        hooks=hooks,
    )
    report(BuildProgress("install", "installing a compiler in a tree of its own", 0.0))
    try:
        await command.run(
            [*words, "/dev/null", "-"],
            input_bytes=sources.encode(),
            timeout_seconds=_BUILD_SECONDS,
            environment=SYSTEM_PATH,
            on_output=_Follower(report),
            package_hint="mmdebstrap",
        )
    except CommandError as error:
        raise as_build_error(doing, error) from error
    kernel = work / _OUTPUT / "vmlinux"
    if not kernel.is_file():
        raise ImageBuildError("the guest kernel was built, and is not there")
    return kernel, (work / _OUTPUT / "release").read_text().strip()


class _Follower:
    """Whole numbers of per cent only: a report per line would drown who listens."""

    def __init__(self, report: ProgressReporter) -> None:
        self._report = report
        self._compiled = 0

    def __call__(self, line: str) -> None:
        if line.startswith(_UNPACKING):
            self._report(BuildProgress("unpack", "unpacking the kernel's source", 0.08))
        elif line.startswith(_COMPILING):
            self._report(BuildProgress("compile", "compiling the kernel", 0.1))
        elif _COMPILED.match(line):
            before = self._share
            self._compiled += 1
            if round(self._share * 100) != round(before * 100):
                self._report(BuildProgress("compile", "compiling the kernel", self._share))

    @property
    def _share(self) -> float:
        return 0.1 + 0.89 * min(1.0, self._compiled / _OBJECTS)
