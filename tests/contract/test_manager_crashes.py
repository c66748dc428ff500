"""A manager that ends anywhere while it creates, limits, stops, starts or destroys a sandbox: whatever its successor makes
of it, packets go where they may and nowhere else, and nothing is left of a sandbox that was destroyed.

On a real network; each manager dies one place further than the last (``crashing_managers``). A creation or a start that so
many managers have resumed is unwound, so the places are dealt to a few sandboxes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import cast

import pytest
from tests.contract.crashing_managers import SETTING_POLICY, MachineRoom, run_managers
from tests.contract.packet_flows import UdpFlow, is_open
from tests.contract.packet_stage import Guest, Stage
from tests.contract.packet_table import try_table
from tests.contract.test_network_packets import NO_LAB
from tests.contract.test_network_policies import counters_left_out
from tests.forked_programs import PROCESSES
from tests.lifecycle.crash_program import CRASHED
from tests.lifecycle.sabotage import Place
from tests.lifecycle.test_every_saga import DOS, UNDOS
from tests.network_lab import INTERNET, NetworkLab, network_lab
from tests.running_manager import wait_until

from atelier.db.engine import Database
from atelier.db.sandbox_networks import SandboxNetwork, SandboxNetworkRepository
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.network.addresses import mac_address_of
from atelier.lifecycle import sandbox_create, sandbox_start, sandbox_stop
from atelier.model.layout import DataLayout
from atelier.model.machine import NetworkAttachment
from atelier.model.sandbox import Sandbox
from atelier.model.states import SandboxState
from atelier.saga import executor

pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

RESUMED_MAX = executor._RECOVERIES_MAX
CREATING = [place for place in DOS if place.kind == sandbox_create.KIND]
STARTING = [place for place in DOS if place.kind == sandbox_start.KIND]
STOPPING = [place for place in DOS if place.kind == sandbox_stop.KIND]
DESTROYING = [
    Place(sandbox_create.KIND, step, "undo", moment)
    for step in dict.fromkeys(place.step for place in reversed(UNDOS) if place.kind == sandbox_create.KIND)
    for moment in ("before", "after")
]
ROUNDS = -(-max(len(CREATING), len(STARTING)) // RESUMED_MAX)
LOG = "managers.log"
NAME, WITNESSES = "crashed", ("north", "south")


def dealt(places: Sequence[Place], number: int) -> list[Place]:
    """The round's share, in the order in which managers get there."""
    return list(places[len(places) * number // ROUNDS : len(places) * (number + 1) // ROUNDS])


@dataclass
class Theatre:
    """A home with two sandboxes that run all the time, and managers that come and go."""

    lab: NetworkLab
    database: Database
    managers: Connection
    room: MachineRoom
    stage: Stage = field(init=False)
    witnesses: list[Guest] = field(default_factory=list)

    # --- managers ---

    def settle(self, errand: str = "", name: str = "") -> None:
        """A manager that does not die takes up what there is and does the errand."""
        assert self._run(errand, name) == 0, self.log.read_text()

    def crash_along(self, places: Sequence[Place], errand: str) -> Iterator[Place]:
        """Managers die at ``places``: the first has been asked for something, the others go on with it by themselves; then
        one that does not die."""
        for number, place in enumerate(places):
            assert self._run("" if number else errand, NAME, str(place)) == CRASHED, self.log.read_text()
            yield place
        self.settle()

    def _run(self, errand: str, name: str, place: str = "") -> int:
        self.managers.send((errand, name, place))
        return self.managers.recv()

    @property
    def log(self) -> Path:
        return self.lab.folder / LOG

    # --- what there is ---

    def find(self, name: str) -> tuple[Sandbox, SandboxNetwork] | None:
        with self.database.read() as connection:
            row = SandboxRepository().find(connection, name)
            return row and (row, SandboxNetworkRepository().get(connection, row.id))

    def slots(self) -> list[str]:
        return self.lab.ask("list_slots")["slots"]

    def has_slot(self) -> bool:
        found = self.find(NAME)
        return found is not None and found[0].id in self.slots()

    def all_there_is(self) -> tuple[object, ...]:
        """Of the network's and the managers'."""
        with self.database.read() as connection:
            rows = [(row.id, row.state) for row in SandboxRepository().list_in(connection)]
            leases = SandboxNetworkRepository().list_leased(connection)
        policies = {file.name: file.read_bytes() for file in self.lab.run.network_policies.iterdir()}
        resources = {file.name for file in (self.lab.folder / "resources").iterdir()}
        network = counters_left_out(self.lab.state())
        return network, policies, self.slots(), rows, leases, resources, set(self.room.descriptors)

    # --- packets ---

    @asynccontextmanager
    async def guest(self, name: str) -> AsyncIterator[Guest]:
        """On the TAP that its machine holds; where it has none yet or none any more, at its place."""
        found = self.find(name)
        assert found is not None
        (row, network) = found
        assert network.lease is not None
        address = self.lab.plan.guest_address(network.lease)
        async with AsyncExitStack() as stack:
            descriptor = self.room.descriptors.get(row.id)
            if descriptor is None:
                descriptor = await stack.enter_async_context(self.lab.driver().opened(row.id))
            assert descriptor is not None
            yield Guest(descriptor, NetworkAttachment("tap", mac_address_of(row.id), address))

    async def wrong_packets(self) -> list[str]:
        """With the crashed sandbox as the guest, where it has a slot; else with those that were there all the time."""
        north, south = self.witnesses
        if not self.has_slot():
            self.stage.seat(north, south)
            return try_table(self.stage)
        async with self.guest(NAME) as guest:
            self.stage.seat(guest, north)
            return try_table(self.stage)


@contextmanager
def running_managers(folder: Path) -> Iterator[Connection]:
    # The checker takes them for those of another system.
    ours, theirs = cast(tuple[Connection, Connection], Pipe())
    managers = PROCESSES.Process(target=run_managers, args=(folder, folder / LOG, theirs), daemon=True)
    managers.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        managers.join(60)
        assert managers.exitcode == 0


@pytest.fixture
async def theatre(tmp_path: Path) -> AsyncIterator[Theatre]:
    async with AsyncExitStack() as stack:
        lab = stack.enter_context(network_lab(tmp_path))
        lab.start_holder()
        room = stack.enter_context(MachineRoom(tmp_path).open())
        made = Theatre(
            lab,
            Database(DataLayout(tmp_path / "data").database),
            stack.enter_context(running_managers(tmp_path)),
            room,
        )
        for name in WITNESSES:
            made.settle("create", name)
        made.database.open()
        stack.callback(made.database.close)
        made.witnesses = [await stack.enter_async_context(made.guest(name)) for name in WITNESSES]
        made.stage = Stage(lab, *made.witnesses, fenced=True)
        made.stage.open(stack.enter_context(ExitStack()))
        yield made


@pytest.mark.parametrize("number", range(ROUNDS))
async def test_packets_go_where_they_may_whatever_step_a_manager_dies_in(theatre: Theatre, number: int) -> None:
    before = theatre.all_there_is()
    with ExitStack() as stack:
        witness = UdpFlow(theatre.stage, stack, INTERNET, 5001)
        assert witness.say()
        creating, stopping, starting, destroying = (
            dealt(places, number) for places in (CREATING, STOPPING, STARTING, DESTROYING)
        )
        for errand, places, state in (
            ("create", creating, SandboxState.RUNNING),
            ("limit", SETTING_POLICY, SandboxState.RUNNING),
            ("stop", stopping, SandboxState.STOPPED),
            ("start", starting, SandboxState.RUNNING),
            ("destroy", destroying, None),
        ):
            for place in theatre.crash_along(places, errand):
                assert await theatre.wrong_packets() == [], f"a manager is dead, by {place}"
            found = theatre.find(NAME)
            assert (found and found[0].state) is state, theatre.log.read_text()
            assert await theatre.wrong_packets() == [], f"after a manager's crash at {places}"
            assert is_open(witness)
        # One of the packets went to an address that the host had for a moment: the holder learns that it is gone.
        with suppress(AssertionError):
            wait_until(lambda: theatre.all_there_is() == before)
        assert theatre.all_there_is() == before
