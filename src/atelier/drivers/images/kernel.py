"""The guest's kernel and its initramfs, from Debian's packages, which are unpacked and never installed.

Called by ``debian.DebianImages``. The kernel is cached by the recipe, the initramfs by its content as well, so a change
of the init script costs no download.
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
from atelier.drivers.images.kernel_payload import extract_kernel, read_module
from atelier.host.file_lock import hold_lock
from atelier.host.files import write_atomically
from atelier.model.errors import ImageBuildError
from atelier.model.image import BuildProgress, ProgressReporter

_FORMAT = 2
_FOLDERS = ("bin", "dev", "proc", "sys", "root", "modules")


@dataclass(frozen=True, slots=True)
class GuestKernel:
    kernel: Path
    initramfs: Path
    release: str


class KernelBuilder:
    """``directory`` is this builder's own part of the cache; ``recipe_directory`` holds recipe.toml and init."""

    def __init__(self, directory: Path, recipe_directory: Path, archive: DebianArchive, source_key: str) -> None:
        self._directory = directory
        self._recipe_directory = recipe_directory
        self._archive = archive
        self._source_key = source_key

    def find(self) -> GuestKernel | None:
        """The kernel and initramfs of the recipe as it stands, if both are built."""
        recipe = self._read_recipe()
        manifest = read_manifest(self._manifest(recipe))
        if manifest is None:
            return None
        kernel = self._directory / str(manifest["kernel"])
        initramfs = self._initramfs(manifest)
        if not kernel.exists() or not initramfs.exists():
            return None
        return GuestKernel(kernel, initramfs, str(manifest["release"]))

    async def ensure(self, report: ProgressReporter) -> GuestKernel:
        """Build what is missing. Raises ImageBuildError, HostError, MissingProgramError, DiskFullError."""
        if found := await asyncio.to_thread(self.find):
            return found

        def waiting() -> None:
            report(BuildProgress("wait", "another process is fetching the guest kernel"))

        async with hold_lock(self._directory / "lock", on_wait=waiting):
            if found := self.find():
                return found
            remove_left_over_work(self._directory)
            recipe = self._read_recipe()
            manifest = read_manifest(self._manifest(recipe))
            if manifest is None or not (self._directory / str(manifest["parts"])).is_dir():
                manifest = await self._fetch(recipe, report)
            report(BuildProgress("initramfs", "packing the initramfs"))
            content = await asyncio.to_thread(self._pack, self._directory / str(manifest["parts"]))
            write_atomically(self._initramfs(manifest), content, mode=0o444)
        found = self.find()
        assert found is not None
        return found

    async def _fetch(self, recipe: _KernelRecipe, report: ProgressReporter) -> dict[str, object]:
        await self._archive.update(report)
        package = await self._archive.get_dependency(recipe.metapackage, recipe.pattern)
        with work_folder(self._directory, "unpacking the guest kernel") as work:
            packages = await self._archive.download([package, "busybox-static"], work / "packages", report)
            report(BuildProgress("unpack", f"unpacking {package}"))
            await self._archive.unpack(packages, work / "tree")
            return await asyncio.to_thread(self._collect, recipe, work)

    def _collect(self, recipe: _KernelRecipe, work: Path) -> dict[str, object]:
        """Take kernel, modules and busybox out of the unpacked packages; returns the manifest."""
        tree = work / "tree"
        images = list((tree / "boot").glob("vmlinuz-*"))
        if len(images) != 1:
            raise ImageBuildError(f"the package that {recipe.metapackage} depends on holds no single kernel")
        release = images[0].name.removeprefix("vmlinuz-")
        kernel = work / "kernel"
        kernel.write_bytes(extract_kernel(images[0].read_bytes()))
        kernel_name = f"vmlinux-{release}-{hash_file(kernel)[:KEY_DIGITS]}"

        parts = work / "parts"
        (parts / "modules").mkdir(parents=True)
        for position, (name, path) in enumerate(_find_modules(tree, recipe.modules)):
            (parts / "modules" / f"{position:02}-{name}.ko").write_bytes(read_module(path))
        (parts / "busybox").write_bytes(_find_busybox(tree).read_bytes())

        digest = hashlib.sha256()
        for path in sorted(parts.rglob("*")):
            if path.is_file():
                digest.update(f"{path.name} {hash_file(path)}\n".encode())
        parts_name = f"parts-{release}-{digest.hexdigest()[:KEY_DIGITS]}"
        publish(kernel, self._directory / kernel_name)
        publish(parts, self._directory / parts_name)
        manifest: dict[str, object] = {"release": release, "kernel": kernel_name, "parts": parts_name}
        write_manifest(self._manifest(recipe), manifest)
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

    def _manifest(self, recipe: _KernelRecipe) -> Path:
        key = key_of(_FORMAT, self._source_key, recipe.metapackage, recipe.pattern, recipe.modules)
        return self._directory / f"kernel-{key}.json"

    def _read_recipe(self) -> _KernelRecipe:
        file = self._recipe_directory / "recipe.toml"
        try:
            fields = tomllib.loads(file.read_text())
            modules = tuple(str(name) for name in cast(list[object], fields["modules"]))
            return _KernelRecipe(str(fields["metapackage"]), str(fields["pattern"]), modules)
        except (OSError, KeyError, ValueError) as error:
            raise ImageBuildError(f"the kernel recipe {file} cannot be read: {error!r}") from error


@dataclass(frozen=True, slots=True)
class _KernelRecipe:
    metapackage: str
    pattern: str
    modules: tuple[str, ...]


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
