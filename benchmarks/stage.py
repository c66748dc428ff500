"""What the figures share within one run: a local manager with a sandbox, a bare guest beside it, the images of both.

Made once by ``__main__``; each part is started when a figure first asks for it and ended with the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import cached_property
from pathlib import Path

import atelier
from atelier.config.settings import load_settings
from atelier.drivers.images.debian import DebianImages
from atelier.drivers.vmm.qemu import QemuVmm
from atelier.model.image import BuildProgress
from benchmarks.api_client import ApiClient
from benchmarks.bare_machine import Ingredients
from benchmarks.crowded_network import CrowdedNetwork, crowded_network
from benchmarks.forks import ForkSamples, measure_forks
from benchmarks.manager_process import RunningManager, running_manager
from benchmarks.progress import say
from benchmarks.raw_port import RawPort, raw_guest


class Stage:
    """``folder`` is temporary, short and ours."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._settings = load_settings()

    @cached_property
    def ingredients(self) -> Ingredients:
        return asyncio.run(self._prepare())

    async def _prepare(self) -> Ingredients:
        settings = self._settings
        images = DebianImages(settings.cache_dir, settings.recipes_dir, Path(atelier.__file__).parent)

        told: set[str] = set()

        def report(progress: BuildProgress) -> None:
            line = f"images: {progress.phase}: {progress.message}"
            if line not in told:
                told.add(line)
                say(line)

        boot = await images.ensure_boot_files(report)
        image = await images.ensure_image("base", report)
        vmm = QemuVmm("aaaa", cache_dir=settings.cache_dir, accelerator=settings.accelerator.value)
        accelerator = await vmm.prepare(boot)
        # Both sides read these from the page cache, also in the first round.
        for path in (boot.kernel, boot.initramfs, boot.tools, image.path):
            await asyncio.to_thread(_read_through, path)
        return Ingredients(boot, image, accelerator, settings.cache_dir)

    @cached_property
    def manager(self) -> RunningManager:
        """In ``local`` mode."""
        ingredients = self.ingredients
        say("starting a manager (local)")
        return self._stack.enter_context(
            running_manager(self.folder / "m", "local", ingredients.accelerator, ingredients.cache_dir)
        )

    @cached_property
    def client(self) -> ApiClient:
        return self._stack.enter_context(self.manager.client())

    @cached_property
    def sandbox(self) -> str:
        """The id of a sandbox that runs through all figures that need one."""
        say("creating a sandbox")
        return self.client.create("bench")

    @cached_property
    def raw_port(self) -> RawPort:
        say("starting a bare guest")
        return self._stack.enter_context(raw_guest(self.folder / "b", self.ingredients))

    @cached_property
    def forks(self) -> ForkSamples:
        say("forking, and cloning bare machines")
        return measure_forks(self.ingredients, self.folder / "f")

    @cached_property
    def crowded_network(self) -> CrowdedNetwork:
        say("making a network with 1,000 slots taken")
        return self._stack.enter_context(crowded_network(self.folder / "n"))

    def mock_manager(self, name: str) -> contextlib.AbstractContextManager[RunningManager]:
        """A fresh one in ``mock`` mode."""
        return running_manager(self.folder / name, "mock", "tcg", self._settings.cache_dir)


def _read_through(path: Path) -> None:
    """The parts that hold data; a sparse image is mostly holes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end, position = os.fstat(descriptor).st_size, 0
        while position < end:
            try:
                position = os.lseek(descriptor, position, os.SEEK_DATA)
            except OSError:
                return
            hole = os.lseek(descriptor, position, os.SEEK_HOLE)
            while position < hole:
                position += len(os.pread(descriptor, min(1 << 20, hole - position), position))
    finally:
        os.close(descriptor)
