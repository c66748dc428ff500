"""The guest's kernel and its initramfs, from Debian's packages, which are unpacked and never installed.

Called by ``debian.DebianImages``. The kernel is Debian's, or one of our own compiled from Debian's source, which is
preferred wherever it is built. It is cached by the recipe, the initramfs by its content as well, so a change of the init
script costs no download.
"""

from __future__ import annotations

import asyncio
import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from atelier.drivers.images.apt import DebianArchive
from atelier.drivers.images.cache import (
    KEY_DIGITS,
    hash_file,
    key_of,
    publish,
    read_manifest,
    remove_left_over_work,
    work_folder,
    write_manifest,
)
from atelier.drivers.images.cpio import CpioArchive
from atelier.drivers.images.kernel_build import SourceRecipe, build_kernel
from atelier.drivers.images.kernel_payload import extract_kernel, read_module
from atelier.host.file_lock import hold_lock
from atelier.host.files import write_atomically
from atelier.model.errors import ImageBuildError
from atelier.model.image import BuildProgress, ProgressReporter

_FORMAT = 2
_BUSYBOX = "busybox-static"
_FOLDERS = ("bin", "dev", "proc", "sys", "root", "modules")


@dataclass(frozen=True, slots=True)
class GuestKernel:
    kernel: Path
    initramfs: Path
    release: str


class KernelBuilder:
    """``directory`` is this builder's own part of the cache; ``recipe_directory`` holds recipe.toml and init.
    ``from_source``: where there is none of our own it is compiled, in place of fetching Debian's."""

    def __init__(
        self,
        directory: Path,
        recipe_directory: Path,
        archive: DebianArchive,
        suite: str,
        architecture: str,
        *,
        from_source: bool,
    ) -> None:
        self._directory = directory
        self._recipe_directory = recipe_directory
        self._archive = archive
        self._suite = suite
        self._architecture = architecture
        self._from_source = from_source

    def find(self) -> GuestKernel | None:
        """The kernel and initramfs of the recipe as it stands, if both are built."""
        manifest = self._find_kernel(self._read_recipe())
        if manifest is None:
            return None
        kernel, initramfs = self._directory / str(manifest["kernel"]), self._initramfs(manifest)
        return GuestKernel(kernel, initramfs, str(manifest["release"])) if initramfs.exists() else None

    def _find_kernel(self, recipe: _KernelRecipe) -> dict[str, object] | None:
        """The manifest of the kernel that is to be taken; None where it has to be made."""
        found = self._read_built(self._manifest_of_own(recipe.source))
        if found and not self._parts(found).is_dir():
            found = None  # spoilt: it could not be given another initramfs
        return found if found or self._from_source else self._read_built(self._manifest_of_debians(recipe))

    def _read_built(self, manifest_file: Path) -> dict[str, object] | None:
        manifest = read_manifest(manifest_file)
        return manifest if manifest and (self._directory / str(manifest["kernel"])).exists() else None

    def _parts(self, manifest: dict[str, object]) -> Path:
        """The folder of busybox and modules, which an initramfs is packed of."""
        return self._directory / str(manifest["parts"])

    async def ensure(self, report: ProgressReporter) -> GuestKernel:
        """Build what is missing. Raises ImageBuildError, HostError, MissingProgramError, DiskFullError."""
        if found := await asyncio.to_thread(self.find):
            return found

        def waiting() -> None:
            report(BuildProgress("wait", "another process is making the guest kernel"))

        async with hold_lock(self._directory / "lock", on_wait=waiting):
            if found := self.find():
                return found
            remove_left_over_work(self._directory)
            recipe = self._read_recipe()
            manifest = self._find_kernel(recipe)
            if manifest is None or not self._parts(manifest).is_dir():
                manifest = await (self._build if self._from_source else self._fetch)(recipe, report)
            report(BuildProgress("initramfs", "packing the initramfs"))
            content = await asyncio.to_thread(self._pack, self._parts(manifest))
            write_atomically(self._initramfs(manifest), content, mode=0o444)
        found = self.find()
        assert found is not None
        return found

    async def _build(self, recipe: _KernelRecipe, report: ProgressReporter) -> dict[str, object]:
        # Taken before they are read: a change in between makes the next build differ, not this one lie.
        manifest_file = self._manifest_of_own(recipe.source)
        await self._archive.update(report)
        with work_folder(self._directory, "building the guest kernel") as work:
            kernel, release = await build_kernel(
                recipe.source, self._suite, self._architecture, self._archive, work, report
            )
            packages = await self._archive.download([_BUSYBOX], work / "packages", report)
            await self._archive.unpack(packages, work / "tree")
            return await asyncio.to_thread(self._publish, kernel, release, [], work, manifest_file)

    async def _fetch(self, recipe: _KernelRecipe, report: ProgressReporter) -> dict[str, object]:
        await self._archive.update(report)
        package = await self._archive.get_dependency(recipe.metapackage, recipe.pattern)
        with work_folder(self._directory, "unpacking the guest kernel") as work:
            packages = await self._archive.download([package, _BUSYBOX], work / "packages", report)
            report(BuildProgress("unpack", f"unpacking {package}"))
            await self._archive.unpack(packages, work / "tree")
            return await asyncio.to_thread(self._collect, recipe, work)

    def _collect(self, recipe: _KernelRecipe, work: Path) -> dict[str, object]:
        """Take kernel and modules out of the unpacked packages; returns the manifest."""
        tree = work / "tree"
        images = list((tree / "boot").glob("vmlinuz-*"))
        if len(images) != 1:
            raise ImageBuildError(f"the package that {recipe.metapackage} depends on holds no single kernel")
        release = images[0].name.removeprefix("vmlinuz-")
        kernel = work / "kernel"
        kernel.write_bytes(extract_kernel(images[0].read_bytes()))
        modules = _find_modules(tree, recipe.modules)
        return self._publish(kernel, release, modules, work, self._manifest_of_debians(recipe))

    def _publish(
        self, kernel: Path, release: str, modules: Sequence[tuple[str, Path]], work: Path, manifest_file: Path
    ) -> dict[str, object]:
        """Give kernel, modules and the unpacked busybox their names; returns the manifest."""
        kernel_name = f"vmlinux-{release}-{hash_file(kernel)[:KEY_DIGITS]}"
        parts = work / "parts"
        (parts / "modules").mkdir(parents=True)
        for position, (name, path) in enumerate(modules):
            (parts / "modules" / f"{position:02}-{name}.ko").write_bytes(read_module(path))
        (parts / "busybox").write_bytes(_find_busybox(work / "tree").read_bytes())

        digest = hashlib.sha256()
        for path in sorted(parts.rglob("*")):
            if path.is_file():
                digest.update(f"{path.name} {hash_file(path)}\n".encode())
        parts_name = f"parts-{release}-{digest.hexdigest()[:KEY_DIGITS]}"
        publish(kernel, self._directory / kernel_name)
        publish(parts, self._directory / parts_name)
        manifest: dict[str, object] = {"release": release, "kernel": kernel_name, "parts": parts_name}
        write_manifest(manifest_file, manifest)
        return manifest

    def _pack(self, parts: Path) -> bytes:
        archive = CpioArchive()
        for folder in _FOLDERS:
            archive.add_directory(folder)
        # The kernel opens it for PID 1 before anything is mounted.
        archive.add_character_device("dev/console", 5, 1)
        archive.add_file("bin/busybox", (parts / "busybox").read_bytes(), executable=True)
        archive.add_file("init", self._init_script(), executable=True)
        for module in sorted((parts / "modules").iterdir()):
            archive.add_file(f"modules/{module.name}", module.read_bytes())
        return archive.finish()

    def _init_script(self) -> bytes:
        return (self._recipe_directory / "init").read_bytes()

    def _initramfs(self, manifest: dict[str, object]) -> Path:
        script = hashlib.sha256(self._init_script()).hexdigest()
        return self._directory / f"initramfs-{manifest['release']}-{key_of(_FORMAT, manifest['parts'], script)}.cpio"

    def _manifest_of_debians(self, recipe: _KernelRecipe) -> Path:
        key = key_of(_FORMAT, self._origin, recipe.metapackage, recipe.pattern, recipe.modules)
        return self._directory / f"kernel-{key}.json"

    def _manifest_of_own(self, recipe: SourceRecipe) -> Path:
        contents = (hash_file(recipe.script), hash_file(recipe.fragment))
        key = key_of(_FORMAT, self._origin, recipe.metapackage, recipe.pattern, recipe.packages, *contents)
        return self._directory / f"own-kernel-{key}.json"

    @property
    def _origin(self) -> str:
        return f"{self._suite}-{self._architecture}"

    def _read_recipe(self) -> _KernelRecipe:
        file = self._recipe_directory / "recipe.toml"
        try:
            fields = tomllib.loads(file.read_text())
            source = fields["from_source"]
            return _KernelRecipe(
                str(fields["metapackage"]),
                str(fields["pattern"]),
                tuple(str(name) for name in cast(list[object], fields["modules"])),
                SourceRecipe(
                    self._recipe_directory / "from_source",
                    str(source["metapackage"]),
                    str(source["pattern"]),
                    tuple(str(name) for name in cast(list[object], source["packages"])),
                ),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ImageBuildError(f"the kernel recipe {file} cannot be read: {error!r}") from error


@dataclass(frozen=True, slots=True)
class _KernelRecipe:
    metapackage: str
    pattern: str
    modules: tuple[str, ...]
    source: SourceRecipe


def _find_modules(tree: Path, names: Sequence[str]) -> list[tuple[str, Path]]:
    """The module files in the order of ``names``. Debian 12 has them plain, Debian 13 as .ko.xz."""
    present = {path.name.split(".ko")[0]: path for path in tree.rglob("*.ko*")}
    missing = [name for name in names if name not in present]
    if missing:
        raise ImageBuildError(f"the guest kernel's package lacks the drivers {', '.join(missing)}")
    return [(name, present[name]) for name in names]


def _find_busybox(tree: Path) -> Path:
    for path in (tree / "bin" / "busybox", tree / "usr" / "bin" / "busybox"):
        if path.exists():
            return path
    raise ImageBuildError("the package busybox-static holds no busybox")
