"""Images: lists and builds. A build belongs to the manager, not to the request that asked for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from atelier.drivers.images.interface import ImageDriver
from atelier.model.errors import AtelierError
from atelier.model.image import BuildProgress, Image

logger = logging.getLogger(__name__)


class ImageService:
    def __init__(self, driver: ImageDriver) -> None:
        self._driver = driver
        self._builds: set[asyncio.Task[Image]] = set()

    async def list_images(self) -> list[Image]:
        return await self._driver.list_images()

    async def list_recipes(self) -> list[str]:
        return await self._driver.list_recipes()

    async def build(self, name: str, *, refresh: bool) -> AsyncIterator[BuildProgress | Image]:
        """Build boot files and image unless cached; yields progress, then the image. Closing the iterator leaves the
        build going. Raises what ``ImageDriver`` raises."""
        loop = asyncio.get_running_loop()
        # Newest reports win: a slow reader loses old progress, never the end.
        reports: asyncio.Queue[BuildProgress | None] = asyncio.Queue()

        def report(progress: BuildProgress) -> None:
            loop.call_soon_threadsafe(reports.put_nowait, progress)

        async def work() -> Image:
            await self._driver.ensure_boot_files(report)
            return await self._driver.ensure_image(name, report, refresh=refresh)

        task = asyncio.create_task(work())
        self._builds.add(task)
        task.add_done_callback(lambda _: reports.put_nowait(None))
        task.add_done_callback(self._ended)
        while (progress := await reports.get()) is not None:
            while not reports.empty() and (newer := reports.get_nowait()) is not None:
                progress = newer
            yield progress
            if task.done():
                break
        yield await asyncio.shield(task)

    async def close(self) -> None:
        """Cancel builds under way; their half-built files are removed by the driver."""
        for task in self._builds:
            task.cancel()
        await asyncio.gather(*self._builds, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Image]) -> None:
        self._builds.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), AtelierError):
            logger.warning("an image build failed: %s", error.message)
