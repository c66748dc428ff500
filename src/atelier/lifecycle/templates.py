"""Makes templates: snapshots of fresh, idle guests, so that creates are restored instead of booted.

Used by ``sandboxes``, which tells of every sandbox that had to boot. A template is made in the background from a sandbox of
Atelier's own, never from a user's, by the steps that every create and every snapshot takes; the sandbox then goes. One
that does not fit any more (a new image, tools image, QEMU) goes when its successor is ready. Other installations get theirs
from this one (``shared_templates``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from atelier.db.engine import Database
from atelier.db.sandboxes import SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.interface import ImageDriver
from atelier.lifecycle.background import BackgroundTasks
from atelier.lifecycle.origins import Origins, template_disk_mib
from atelier.lifecycle.snapshots import Snapshots
from atelier.model.errors import AtelierError, GuestError
from atelier.model.guest import ProcessSpec
from atelier.model.ids import new_id
from atelier.model.network_policy import CLOSED_POLICY, NetworkPolicy
from atelier.model.sandbox import Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.snapshot import Snapshot, SnapshotPurpose, SnapshotState
from atelier.model.states import SandboxState

_logger = logging.getLogger(__name__)

_WARMING = (("sh", "-c", ":"), ("bash", "-l", "-c", ":"), ("python3", "-c", "pass"))
"""What nearly every use of a sandbox runs: its files are then in the memory that all share. An image may lack some."""
_IDLE_PERCENT = 10.0
_IDLE_POLLS = 30
_IDLE_PAUSE_SECONDS = 0.5
_AGAIN_AFTER_SECONDS = 600.0


class CreateSandbox(Protocol):
    """``SandboxLifecycle.start_create``."""

    async def __call__(
        self, name: str, spec: SandboxSpec, policy: NetworkPolicy = ..., *, purpose: SandboxPurpose = ...
    ) -> Sandbox: ...


class Templates:
    """``create``, ``settle`` and ``destroy`` are the lifecycle's own; ``share`` hands on what is ready. ``idle_pause_seconds`` stands between two looks at
    whether a guest is idle."""

    def __init__(
        self,
        *,
        database: Database,
        images: ImageDriver,
        guests: GuestDriver,
        origins: Origins,
        snapshots: Snapshots,
        background: BackgroundTasks,
        create: CreateSandbox,
        settle: Callable[[str, float | None], Awaitable[Sandbox | None]],
        destroy: Callable[[str], Awaitable[None]],
        share: Callable[[Snapshot], Awaitable[None]],
        idle_pause_seconds: float = _IDLE_PAUSE_SECONDS,
    ) -> None:
        self._database = database
        self._images = images
        self._guests = guests
        self._origins = origins
        self._snapshots = snapshots
        self._background = background
        self._create = create
        self._settle = settle
        self._destroy = destroy
        self._share = share
        self._idle_pause_seconds = idle_pause_seconds
        self._under_way: set[str] = set()
        self._not_before: dict[str, float] = {}

    def want(self, booted: Sandbox) -> None:
        """A sandbox had to boot: have a template made for the next one like it, unless one is, or that failed lately."""
        is_anybodys = booted.purpose is not SandboxPurpose.TEMPLATE
        if self._origins.uses_templates and is_anybodys and booted.snapshot_id is None:
            self._background.spawn(self._make(booted), f"make a template like {booted.name}")

    async def clear(self) -> None:
        """After a start: what the last manager left of templates that it was about to make."""
        with self._database.read() as connection:
            sandboxes = [
                each for each in SandboxRepository().list_in(connection) if each.purpose is SandboxPurpose.TEMPLATE
            ]
        for sandbox in sandboxes:
            await self._try(self._destroy(sandbox.id))
        # Only now: what was being taken of these has failed by their end.
        with self._database.read() as connection:
            spoilt = SnapshotRepository().list_in(
                connection, [SnapshotState.FAILED, SnapshotState.DAMAGED], [SnapshotPurpose.TEMPLATE]
            )
        for template in spoilt:
            await self._try(self._snapshots.delete(template.id))

    async def _make(self, booted: Sandbox) -> None:
        boot = await self._images.ensure_boot_files(lambda _: None)
        image = await self._images.ensure_image(booted.spec.image, lambda _: None)
        key = await self._origins.template_key(booted, image, boot)
        now = asyncio.get_running_loop().time()
        if key in self._under_way or self._not_before.get(key, 0.0) > now:
            return
        self._under_way.add(key)
        try:
            if await self._origins.find_template(key, booted, image, boot, is_awaited=False) is not None:
                return
            spec = SandboxSpec(
                image=booted.spec.image,
                vcpu_count=booted.spec.vcpu_count,
                memory_mib=booted.spec.memory_mib,
                disk_mib=template_disk_mib(image),
            )
            await self._make_from(spec, key)
        except AtelierError as error:
            self._not_before[key] = now + _AGAIN_AFTER_SECONDS
            _logger.warning("no template could be made like sandbox %s: %s", booted.name, error)
        finally:
            self._under_way.discard(key)

    async def _make_from(self, spec: SandboxSpec, key: str) -> None:
        name = f"template-{new_id(8)}"
        sandbox = await self._create(name, spec, CLOSED_POLICY, purpose=SandboxPurpose.TEMPLATE)
        try:
            settled = await self._settle(sandbox.id, None)
            if settled is None or settled.state is not SandboxState.RUNNING:
                raise GuestError(f"its guest did not come up: {settled.failure_message if settled else 'it is gone'}")
            await self._warm(sandbox.id)
            snapshot = await self._snapshots.take(sandbox.id, name, purpose=SnapshotPurpose.TEMPLATE, template_key=key)
            made = await self._snapshots.wait_settled(snapshot.id, None)
            assert made is not None, "waited without limit"
            if made.state is not SnapshotState.READY:
                await self._try(self._snapshots.delete(made.id))
                raise GuestError(f"it could not be saved: {made.failure_message}")
        finally:
            await self._try(self._destroy(sandbox.id))
        _logger.info("template %s is ready: creates like it are restored from now on", name)
        await self._snapshots.drop_superseded(made)
        await self._share(made)

    async def _warm(self, sandbox_id: str) -> None:
        """Run what every sandbox runs, then wait until nothing goes on any more."""
        for arguments in _WARMING:
            spec = ProcessSpec(arguments, timeout_seconds=60.0)
            try:
                async with self._guests.start_process(sandbox_id, spec) as events:
                    async for _ in events:
                        pass
            except AtelierError as error:
                _logger.debug("a template is not warmed by %s: %s", arguments[0], error)
        await self._guests.metrics(sandbox_id)
        for _ in range(_IDLE_POLLS):
            await asyncio.sleep(self._idle_pause_seconds)
            if (await self._guests.metrics(sandbox_id)).cpu_used_percent < _IDLE_PERCENT:
                return

    async def _try(self, work: Awaitable[None]) -> None:
        try:
            await work
        except AtelierError as error:
            _logger.warning("something of a template stays for now: %s", error)
