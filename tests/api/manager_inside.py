"""A manager in mock mode inside of the test's own process: its fakes can hang and fail, and its clock can be put on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from atelier.config.settings import load_settings
from atelier.drivers.guest.fake import FakeGuests
from atelier.drivers.network.fake import FakeNetwork
from atelier.drivers.storage.fake import FakeStorage
from atelier.drivers.vmm.fake import FakeVmm
from atelier.manager import installation
from atelier.manager.installation import Installation
from atelier.manager.wiring import Drivers, choose_drivers
from atelier.saga.retry import RetryPolicies, RetryPolicy
from atelier.services.events import EventService

_QUICK_RETRIES = RetryPolicies(RetryPolicy(3, 0.01, 0.02), RetryPolicy(8, 0.01, 0.02), RetryPolicy(6, 0.01, 0.02))
"""As often as ever, with shorter pauses."""


class Clock:
    def __init__(self) -> None:
        self._ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    def put_on(self, seconds: float) -> None:
        self._ahead += timedelta(seconds=seconds)


@dataclass(frozen=True)
class ManagerInside:
    client: httpx.AsyncClient
    installation: Installation
    guests: FakeGuests
    storage: FakeStorage
    network: FakeNetwork
    vmm: FakeVmm
    events: EventService
    clock: Clock

    async def enforce_limits(self) -> None:
        await self.installation.lifecycle.time_limits.enforce()

    async def settle(self, sandbox: str) -> None:
        await self.installation.lifecycle.wait_settled(sandbox, 20)


@asynccontextmanager
async def open_manager_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ManagerInside]:
    chosen: list[Drivers] = []

    async def choose(*arguments: object) -> Drivers:
        chosen.append(await choose_drivers(*arguments))  # type: ignore[arg-type]
        return chosen[-1]

    monkeypatch.setattr(installation, "choose_drivers", choose)
    environment = {"ATELIER_RUN_DIR": str(folder / "run"), "ATELIER_CACHE_DIR": str(folder / "cache")}
    settings = load_settings(
        mode="mock",
        data_dir=str(folder / "data"),
        listen="127.0.0.1:0",
        environment={"HOME": str(folder), **environment},
    )
    async with Installation.open(settings) as opened:
        clock = Clock()
        lifecycle = opened.lifecycle
        lifecycle._executor._policies = _QUICK_RETRIES
        lifecycle._now = lifecycle.activity._now = lifecycle.time_limits._now = clock
        key = json.loads((folder / "data/token.json").read_text())["api_key"]
        guests, storage, network, vmm = chosen[-1].guests, chosen[-1].storage, chosen[-1].network, chosen[-1].vmm
        assert isinstance(guests, FakeGuests)
        assert isinstance(storage, FakeStorage)
        assert isinstance(network, FakeNetwork)
        assert isinstance(vmm, FakeVmm)
        events = EventService(opened.fleet._database)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(opened.application),
            base_url="http://127.0.0.1",
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
        ) as client:
            yield ManagerInside(client, opened, guests, storage, network, vmm, events, clock)
