"""A network of the benchmark's own with 1,000 slots taken, and a namespace without anything beside it.

Used by ``slot_setup`` and ``slot_delete_50``. It is the tests' network: host, internet and home are namespaces that go
with the run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from tests.network_lab import NetworkLab, network_lab

from atelier.host import tap
from atelier.host.netlink import RouteSocket
from atelier.model.address_plan import SLOT_COUNT
from atelier.model.ids import new_sandbox_id

LEASES = 1000
_BARE_GROUP = 7


@dataclass
class CrowdedNetwork:
    """``leases``: who holds which."""

    lab: NetworkLab
    leases: dict[int, str] = field(default_factory=dict)

    @property
    def free_leases(self) -> list[int]:
        return [lease for lease in range(SLOT_COUNT) if lease not in self.leases]

    async def take(self, lease: int) -> None:
        sandbox_id = new_sandbox_id()
        await self.lab.driver().ensure_slot(sandbox_id, lease)
        self.leases[lease] = sandbox_id

    async def free(self, leases: list[int]) -> None:
        """At once."""
        driver = self.lab.driver()
        await asyncio.gather(*(driver.ensure_slot_absent(self.leases.pop(lease)) for lease in leases))

    @contextlib.contextmanager
    def bare(self) -> Generator[BareTaps]:
        """This thread where nothing but a card and loopback are. Nothing may be awaited inside."""
        with self.lab.inside("internet"):
            links = RouteSocket()
            try:
                yield BareTaps(links)
            finally:
                links.close()


@dataclass(frozen=True)
class BareTaps:
    """TAPs on no bridge and under no rules."""

    links: RouteSocket

    def make(self, number: int) -> None:
        """Up, in a group."""
        tap.create_persistent(f"bare{number}")
        index = self.links.get_link(f"bare{number}").index
        self.links.set_group(index, _BARE_GROUP)
        self.links.set_up(index)

    def delete_all(self) -> None:
        """At once."""
        self.links.delete_group(_BARE_GROUP)


@contextlib.contextmanager
def crowded_network(folder: Path) -> Generator[CrowdedNetwork]:
    folder.mkdir()
    with network_lab(folder) as lab:
        lab.start_holder()
        network = CrowdedNetwork(lab)
        asyncio.run(_fill(network))
        yield network


async def _fill(network: CrowdedNetwork) -> None:
    for lease in range(LEASES):
        await network.take(lease)
