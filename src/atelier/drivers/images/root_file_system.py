"""Builds a root file system image from a recipe: mmdebstrap makes a tree, mke2fs an image of it.

Called by ``debian.DebianImages``, which holds the lock and names the result. As root mmdebstrap works on a folder; for
an ordinary user it works in a user namespace of its own and hands over a tar archive, which is unpacked in a namespace
in which the cache's owner is root: so owners come out right and everything left in the cache is that user's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from atelier.drivers.images.apt import DebianArchive
from atelier.drivers.images.cache import as_build_error
from atelier.drivers.images.ext4 import SYSTEM_PATH, WRITABLE_ROOT, make_ext4, user_namespace
from atelier.drivers.images.mmdebstrap import check_user_namespace, mmdebstrap
from atelier.drivers.images.recipe import ImageRecipe
from atelier.host import command
from atelier.model.errors import CommandError
from atelier.model.image import BuildProgress, ProgressReporter

_MMDEBSTRAP_SECONDS = 3600.0
_TAR_SECONDS = 600.0
TREE_NAME = "tree"

# What mmdebstrap says when a phase begins -> (phase, message, share of the whole before it, share after it); the shares
# are those of a build on a fast line.
_PHASES = (
    ("I: running apt-get update", "download", "fetching package lists", 0.0, 0.06),
    ("I: downloading packages with apt", "download", "downloading packages", 0.06, 0.1),
    ("I: extracting archives", "unpack", "unpacking packages", 0.1, 0.3),
    ("I: installing essential packages", "install", "installing essential packages", 0.3, 0.5),
    ("I: installing remaining packages", "install", "installing packages", 0.5, 0.85),
    ("I: running --customize-hook", "install", "setting up the user", 0.85, 0.87),
    ("I: cleaning package lists", "install", "cleaning up", 0.87, 0.88),
    ("I: creating tarball", "pack", "packing the tree", 0.88, 0.9),
)
_MKE2FS_FRACTION = 0.9
_NEWLY_INSTALLED = re.compile(r"(\d+) newly installed")


async def build_root_image(
    recipe: ImageRecipe,
    architecture: str,
    archive: DebianArchive,
    image: Path,
    work: Path,
    report: ProgressReporter,
    *,
    identity: str,
) -> None:
    """Write ``image`` (must not exist) using ``work``, a folder of the cache that the caller removes.

    Raises ImageBuildError with the end of the builder's output, HostError, MissingProgramError, DiskFullError.
    """
    await archive.update(report)
    await archive.check_packages(recipe.packages)
    sources = "\n".join(source.render() for source in await archive.find_sources())
    root = os.geteuid() == 0
    check_user_namespace()
    namespace = user_namespace(whole_range=True)
    tree = work / TREE_NAME
    made = tree if root else work / "tree.tar"
    follow = PhaseFollower(report)
    try:
        await command.run(
            [
                *mmdebstrap(
                    recipe.suite,
                    architecture,
                    recipe.packages,
                    await archive.connection_settings(),
                    output_format="directory" if root else "tar",
                    excluded_paths=recipe.excluded_paths,
                    hooks=[str(recipe.customize)] if recipe.customize else [],
                ),
                *(str(made), "-"),
            ],
            input_bytes=sources.encode(),
            timeout_seconds=_MMDEBSTRAP_SECONDS,
            environment=SYSTEM_PATH,
            on_output=follow,
            package_hint="mmdebstrap",
        )
        if not root:
            report(BuildProgress("unpack", "unpacking the tree", _MKE2FS_FRACTION))
            # Device nodes cannot be made in a user namespace, and the guest's kernel makes them anyway.
            tree.mkdir()
            await command.run(
                [*namespace, "tar", "-x", "-f", str(made), "-C", str(tree), "--numeric-owner", "--exclude=./dev/*"],
                timeout_seconds=_TAR_SECONDS,
                package_hint="tar",
            )
            made.unlink()
        report(BuildProgress("mke2fs", f"making the file system of {recipe.size_mib} MiB", _MKE2FS_FRACTION))
        await make_ext4(tree, image, recipe.size_mib, WRITABLE_ROOT, identity=identity, namespace=namespace)
    except CommandError as error:
        raise as_build_error(f"building the image {recipe.name}", error) from error
    finally:
        await remove_built_tree(tree)


async def remove_built_tree(tree: Path) -> None:
    """Remove an unpacked tree; absent is fine. An ordinary user can only do it inside the namespace, since the files
    belong to the user's subordinate uids."""
    if tree.exists():
        await command.run(
            [*user_namespace(whole_range=True), "rm", "-rf", "--one-file-system", "--", str(tree)],
            timeout_seconds=_TAR_SECONDS,
        )


class PhaseFollower:
    """Turns mmdebstrap's and apt's lines into progress reports. Whole numbers of per cent only: a report per line would
    drown who listens."""

    def __init__(self, report: ProgressReporter) -> None:
        self._report = report
        self._phase = _PHASES[0]
        self._expected_lines = 0
        self._seen_lines = 0
        self._reported = ("", -1)

    def __call__(self, line: str) -> None:
        for phase in _PHASES:
            if line.startswith(phase[0]):
                self._phase, self._expected_lines, self._seen_lines = phase, 0, 0
                self._say(0.0)
                return
        if match := _NEWLY_INSTALLED.search(line):
            # Each package is unpacked once and set up once.
            self._expected_lines = int(match[1]) * (1 if self._phase[1] == "download" else 2)
            self._seen_lines = 0
        elif line.startswith(("Get:", "Unpacking ", "Setting up ")):
            self._seen_lines += 1
            if self._expected_lines:
                self._say(min(1.0, self._seen_lines / self._expected_lines))

    def _say(self, share: float) -> None:
        _, phase, message, before, after = self._phase
        fraction = before + (after - before) * share
        per_cent = round(fraction * 100)
        if (message, per_cent) != self._reported:
            self._reported = (message, per_cent)
            self._report(BuildProgress(phase, message, per_cent / 100))
