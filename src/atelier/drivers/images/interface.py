"""Interface of the image drivers: root file systems, kernel, initramfs and tools image, cached by content."""

from __future__ import annotations

from typing import Protocol

from atelier.model.image import Image, ProgressReporter
from atelier.model.machine import BootFiles


class ImageDriver(Protocol):
    """Builds images and finds built ones. Builds of the same thing at once, also by another process, happen once.

    Raises NotFoundError (``image_not_found``) for a name without a recipe, ImageBuildError with the end of the
    builder's output, MissingProgramError, DiskFullError.
    """

    @property
    def name(self) -> str: ...

    async def list_recipes(self) -> list[str]:
        """Names that ``ensure_image`` knows."""
        ...

    async def list_images(self) -> list[Image]: ...

    async def find_image(self, name: str) -> Image | None:
        """The newest built image of the recipe as it stands now; None if it has to be built."""
        ...

    async def ensure_image(self, name: str, report: ProgressReporter, *, refresh: bool = False) -> Image:
        """Build the image unless it is cached. ``refresh`` builds again (newer packages) and supersedes the old one,
        which stays as long as anything refers to it."""
        ...

    async def ensure_boot_files(self, report: ProgressReporter) -> BootFiles:
        """Kernel, initramfs and tools image, built or cached."""
        ...

    async def find_boot_files(self) -> BootFiles | None:
        """As ``ensure_boot_files``, but None where something would have to be built."""
        ...


class WebFiles(Protocol):
    """Files of others that the manager's pages need."""

    async def read(self, name: str) -> bytes | None:
        """None: there is none of that name. Fetched at first use; raises MissingPackageError when that fails."""
        ...
