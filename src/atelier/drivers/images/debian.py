"""Images made from Debian's packages on this machine, cached by content and shared between installations.

Constructed by ``manager.wiring``; called by the image use cases and the create saga. It installs nothing on the host,
never rewrites a published file, and never removes one: what refers to an image is not known here.
"""

from __future__ import annotations

import asyncio
import platform
from datetime import UTC, datetime
from pathlib import Path

from atelier.drivers.images.apt import DebianArchive
from atelier.drivers.images.cache import (
    check_room,
    publish,
    read_manifest,
    remove_left_over_work,
    work_folder,
    write_manifest,
)
from atelier.drivers.images.kernel import GuestKernel, KernelBuilder
from atelier.drivers.images.recipe import ImageRecipe, get_recipe, list_recipe_names
from atelier.drivers.images.root_file_system import TREE_NAME, build_root_image, remove_built_tree
from atelier.drivers.images.tools import ToolsBuilder, ToolsImage
from atelier.host.file_lock import hold_lock
from atelier.model.errors import HostError
from atelier.model.image import BuildProgress, Image, ProgressReporter
from atelier.model.machine import BootFiles

_FORMAT = 1
"""Changes whenever the same recipe gives a different image."""

_SUITE = "bookworm"
"""Where kernel, busybox and the guest agent's Python come from."""

_NEEDED_MIB = 1024
"""Packages, tree and image of the base recipe, with something to spare."""

APT_DIRECTORY = Path("/etc/apt")
"""Where the machine's own package sources are described."""

_ARCHITECTURES = {"x86_64": "amd64"}


class DebianImages:
    """``cache_dir`` is made if absent; ``recipes_dir`` holds one folder per recipe, ``kernel`` and ``tools``;
    ``agent_source`` is the folder of the package ``atelier`` (with guest_agent and guest_protocol in it); ``own_kernel``:
    the guest kernel is compiled where it is not yet, rather than Debian's taken."""

    def __init__(self, cache_dir: Path, recipes_dir: Path, agent_source: Path, *, own_kernel: bool = False) -> None:
        self._cache_dir = cache_dir.absolute()
        self._recipes_dir = recipes_dir
        self._agent_source = agent_source
        self._own_kernel = own_kernel

    @property
    def name(self) -> str:
        return "debian"

    async def list_recipes(self) -> list[str]:
        return list_recipe_names(self._recipes_dir)

    async def list_images(self) -> list[Image]:
        """Every built image, superseded ones too, oldest first."""
        found = [image for file in self._images.glob("*.json") if (image := self._read_image(file))]
        return sorted(found, key=lambda image: (image.built_at, image.id))

    async def find_image(self, name: str) -> Image | None:
        recipe = get_recipe(self._recipes_dir, name)
        return self._find_newest(recipe)

    async def ensure_image(self, name: str, report: ProgressReporter, *, refresh: bool = False) -> Image:
        recipe = get_recipe(self._recipes_dir, name)
        if not refresh and (found := self._find_newest(recipe)):
            return found
        asked_at = datetime.now(UTC)

        def waiting() -> None:
            report(BuildProgress("wait", f"another process is building the image {name}"))

        async with hold_lock(self._images / f"{name}.lock", on_wait=waiting):
            found = self._find_newest(recipe)
            # Who waited for another build has what was asked for, a refresh too if that build began after the asking.
            if found and (not refresh or found.built_at > asked_at):
                return found
            # The lock is one recipe's, so is the folder that is cleared.
            work_parent = self._images / f"{name}.work"
            for tree in work_parent.glob(f"*/{TREE_NAME}"):
                await remove_built_tree(tree)
            remove_left_over_work(work_parent)
            return await self._build(recipe, report, generation=found.id if found else "")

    async def ensure_boot_files(self, report: ProgressReporter) -> BootFiles:
        kernel = await self._kernel_builder().ensure(report)
        tools = await self._tools_builder().ensure(report)
        return _boot_files(kernel, tools)

    async def find_boot_files(self) -> BootFiles | None:
        kernel = await asyncio.to_thread(self._kernel_builder().find)
        tools = await asyncio.to_thread(self._tools_builder().find)
        return _boot_files(kernel, tools) if kernel and tools else None

    async def _build(self, recipe: ImageRecipe, report: ProgressReporter, *, generation: str) -> Image:
        """``generation`` is the id of the image that this one supersedes, so that their ids differ."""
        check_room(self._images, _NEEDED_MIB, f"building the image {recipe.name}")
        began_at = datetime.now(UTC)
        key = recipe.key(_FORMAT, self._architecture, generation)
        image_id = f"{recipe.name}-{key}"
        final = self._images / f"{image_id}.ext4"
        with work_folder(self._images / f"{recipe.name}.work", f"building the image {recipe.name}") as work:
            image = work / "image"
            await build_root_image(
                recipe, self._architecture, self._archive(recipe.suite), image, work, report, identity=image_id
            )
            await asyncio.to_thread(publish, image, final)
        write_manifest(
            self._images / f"{image_id}.json",
            {
                "id": image_id,
                "name": recipe.name,
                "recipe_key": self._recipe_key(recipe),
                "size_mib": recipe.size_mib,
                "built_at": began_at.isoformat(),
                "suite": recipe.suite,
                "architecture": self._architecture,
                "supersedes": generation,
            },
        )
        built = self._find_newest(recipe)
        assert built is not None
        report(BuildProgress("done", f"built {image_id}", 1.0))
        return built

    def _find_newest(self, recipe: ImageRecipe) -> Image | None:
        key = self._recipe_key(recipe)
        found = [
            image
            for file in self._images.glob(f"{recipe.name}-*.json")
            if (image := self._read_image(file, recipe_key=key)) is not None
        ]
        return max(found, key=lambda image: (image.built_at, image.id), default=None)

    def _read_image(self, manifest_file: Path, *, recipe_key: str = "") -> Image | None:
        manifest = read_manifest(manifest_file)
        path = manifest_file.with_suffix(".ext4")
        if manifest is None or (recipe_key and manifest.get("recipe_key") != recipe_key):
            return None
        try:
            return Image(
                id=str(manifest["id"]),
                name=str(manifest["name"]),
                path=path,
                size_mib=int(str(manifest["size_mib"])),
                stored_bytes=path.stat().st_blocks * 512,
                built_at=datetime.fromisoformat(str(manifest["built_at"])),
            )
        except (KeyError, ValueError, FileNotFoundError):
            return None

    def _recipe_key(self, recipe: ImageRecipe) -> str:
        return recipe.key(_FORMAT, self._architecture)

    def _archive(self, suite: str) -> DebianArchive:
        return DebianArchive(
            self._cache_dir / "packages" / suite, suite, self._architecture, apt_directory=APT_DIRECTORY
        )

    def _kernel_builder(self) -> KernelBuilder:
        return KernelBuilder(
            self._cache_dir / "kernel",
            self._recipes_dir / "kernel",
            self._archive(_SUITE),
            _SUITE,
            self._architecture,
            from_source=self._own_kernel,
        )

    def _tools_builder(self) -> ToolsBuilder:
        return ToolsBuilder(
            self._cache_dir / "tools",
            self._recipes_dir / "tools",
            self._agent_source,
            self._archive(_SUITE),
            self._source_key,
        )

    @property
    def _images(self) -> Path:
        return self._cache_dir / "images"

    @property
    def _architecture(self) -> str:
        machine = platform.machine()
        if machine not in _ARCHITECTURES:
            raise HostError(
                f"images are built for x86-64 machines only; this one is {machine}", code="unsupported_architecture"
            )
        return _ARCHITECTURES[machine]

    @property
    def _source_key(self) -> str:
        return f"{_SUITE}-{self._architecture}"


def _boot_files(kernel: GuestKernel, tools: ToolsImage) -> BootFiles:
    return BootFiles(
        kernel=kernel.kernel,
        initramfs=kernel.initramfs,
        tools=tools.path,
        kernel_release=kernel.release,
        tools_id=tools.id,
    )
