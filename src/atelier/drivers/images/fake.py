"""Images that take no time and no network: placeholder files, for mode ``mock`` and tests."""

from __future__ import annotations

import asyncio
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from atelier.drivers.faults import Faults
from atelier.model.errors import NotFoundError
from atelier.model.image import BuildProgress, Image, ProgressReporter
from atelier.model.machine import BootFiles
from atelier.model.sandbox import DEFAULT_DISK_MIB

_SIZE_MIB = DEFAULT_DISK_MIB


class FakeImages:
    """``recipes`` can be "built", each at once or after ``faults.delay_seconds``. The files lie in ``folder``, where the
    next one writes the same again; None: in a folder that vanishes with the object, but not with a killed process."""

    def __init__(
        self, faults: Faults | None = None, *, recipes: tuple[str, ...] = ("base",), folder: Path | None = None
    ) -> None:
        self.faults = faults or Faults()
        self._recipes = recipes
        if folder is None:
            self._own = tempfile.TemporaryDirectory(prefix="atelier-fake-images-")
            folder = Path(self._own.name)
        self._folder = folder
        self._built: dict[str, list[Image]] = {}
        self._boot: BootFiles | None = None
        self._building = asyncio.Lock()

    @property
    def name(self) -> str:
        return "fake"

    async def list_recipes(self) -> list[str]:
        return list(self._recipes)

    async def list_images(self) -> list[Image]:
        return [image for generations in self._built.values() for image in generations]

    async def find_image(self, name: str) -> Image | None:
        self._check(name)
        generations = self._built.get(name)
        return generations[-1] if generations else None

    async def ensure_image(self, name: str, report: ProgressReporter, *, refresh: bool = False) -> Image:
        self._check(name)
        async with self._building:
            generations = self._built.setdefault(name, [])
            if generations and not refresh:
                return generations[-1]
            report(BuildProgress("build", f"pretending to build {name}", 0.0))
            await self.faults.before("ensure_image")
            number = len(generations) + 1
            path = self._placeholder(f"{name}-{number:016x}.ext4")
            image = Image(path.stem, name, path, _SIZE_MIB, path.stat().st_size, datetime.now(UTC))
            generations.append(image)
            report(BuildProgress("build", f"built {name}", 1.0))
            return image

    async def ensure_boot_files(self, report: ProgressReporter) -> BootFiles:
        async with self._building:
            if self._boot is None:
                await self.faults.before("ensure_boot_files")
                kernel, initramfs, tools = (self._placeholder(name) for name in ("kernel", "initramfs", "tools.ext4"))
                self._boot = BootFiles(kernel, initramfs, tools, "0.0.0-fake", "fake-tools")
                report(BuildProgress("boot files", "pretended", 1.0))
            return self._boot

    async def find_boot_files(self) -> BootFiles | None:
        return self._boot

    def _check(self, name: str) -> None:
        if name not in self._recipes:
            raise NotFoundError(
                f"there is no image {name!r}", code="image_not_found", hint=f"known images: {', '.join(self._recipes)}"
            )

    def _placeholder(self, name: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        path.write_bytes(b"placeholder\n")
        return path
