"""Managers that end themselves, one after another, on a real network: run in a process of its own by
``test_manager_crashes``.

``run_managers``: for each (errand, sandbox's name, place) that comes by the connection, one manager is forked, which
takes up what the last one left, does the errand and ends by ``os._exit`` at the place, or in good order when all has
settled; then its exit code is sent back. Forked, as starting a program takes longer than it runs.

All drivers are ``crash_program``'s files, but for the network's. Machines hold their TAPs and outlive the managers, as
QEMU does: the descriptors go to ``MachineRoom``, in the process that is to send and hear their packets.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

from tests.lifecycle.crash_program import CRASHED, FileDrivers, make_lifecycle
from tests.lifecycle.sabotage import Disturbance, Place, disturb

from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.network.bridge import BridgeNetwork
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import NotFoundError
from atelier.model.layout import RunLayout
from atelier.model.machine import MachineSpec, ProcessIdentity
from atelier.model.network_policy import EgressMode, EgressPolicy, NetworkPolicy
from atelier.model.sandbox import SandboxSpec

LISTED = NetworkPolicy(EgressPolicy.make(EgressMode.LIST, ["203.0.113.0/24"]), upload_kbit_per_second=1_000_000)
"""What the errand ``limit`` sets: all that the packet table expects to pass is allowed."""
SETTING_POLICY = tuple(Place("network_policy", "set_policy", "do", moment) for moment in ("before", "after"))
_SETTLE_SECONDS = 60


class MachineRoom:
    """The machines' ends of their TAPs, in ``descriptors`` by sandbox id."""

    def __init__(self, folder: Path) -> None:
        self.descriptors: dict[str, int] = {}
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(str(_room(folder)))
        self._listening.listen()
        self._thread = Thread(target=self._serve, daemon=True)

    @contextmanager
    def open(self) -> Iterator[MachineRoom]:
        self._thread.start()
        try:
            yield self
        finally:
            self._listening.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._listening.close()
            for descriptor in self.descriptors.values():
                os.close(descriptor)

    def _serve(self) -> None:
        with suppress(OSError):  # shut down
            while True:
                connection, _ = self._listening.accept()
                with connection:
                    word, descriptors, _, _ = socket.recv_fds(connection, 100, 1)
                    before = self.descriptors.pop(word.decode(), None)
                    if before is not None:
                        os.close(before)
                    for descriptor in descriptors:
                        self.descriptors[word.decode()] = descriptor
                    connection.send(b"done")


def _room(folder: Path) -> Path:
    return folder / "machines.sock"


class HoldingDrivers(FileDrivers):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "resources")
        self._room = _room(folder)

    async def ensure_started(self, spec: MachineSpec, network_descriptor: int | None = None) -> ProcessIdentity:
        if spec.sandbox_id not in self._ids("vmm"):
            assert network_descriptor is not None
            self._hold(spec.sandbox_id, network_descriptor)
        return await super().ensure_started(spec, network_descriptor)

    async def ensure_stopped(self, sandbox_id: str, run_directory: Path, identity: ProcessIdentity | None) -> None:
        self._hold(sandbox_id)
        await super().ensure_stopped(sandbox_id, run_directory, identity)

    async def shut_down(self, sandbox_id: str) -> None:
        self._hold(sandbox_id)
        await super().shut_down(sandbox_id)

    def _hold(self, sandbox_id: str, *descriptors: int) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_SETTLE_SECONDS)
            connection.connect(str(self._room))
            socket.send_fds(connection, [sandbox_id.encode()], list(descriptors))
            assert connection.recv(100) == b"done"


class DisturbedNetwork(BridgeNetwork):
    """In the change of a policy, which is no saga's."""

    def __init__(self, socket_path: Path, disturbance: Disturbance) -> None:
        super().__init__(socket_path)
        self._disturbance = disturbance

    async def set_policy(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        if policy != LISTED:  # another sandbox's, which each manager gives again
            return await super().set_policy(sandbox_id, policy)
        before, after = SETTING_POLICY
        await self._disturbance(before)
        await super().set_policy(sandbox_id, policy)
        return await self._disturbance(after)


async def run_manager(folder: Path, errand: str, name: str, place: str) -> None:
    async def crash(reached: Place) -> None:
        if str(reached) == place:
            os._exit(CRASHED)

    network = DisturbedNetwork(RunLayout(folder / "run").network_socket, crash)
    database, lifecycle = make_lifecycle(folder, HoldingDrivers(folder), network=network)
    disturb(lifecycle, crash)
    await lifecycle.recover()
    if errand == "create":
        await lifecycle.start_create(name, SandboxSpec())
    with database.read() as connection:
        ids = {row.name: row.id for row in SandboxRepository().list_in(connection)}
    await _do(lifecycle, errand, ids.get(name, ""))
    for sandbox_id in ids.values():
        with suppress(NotFoundError):
            assert await lifecycle.wait_settled(sandbox_id, _SETTLE_SECONDS) is not None
    await lifecycle.network_policies.enforce_pending()
    await lifecycle.close()
    database.close()


async def _do(lifecycle: SandboxLifecycle, errand: str, sandbox_id: str) -> None:
    if errand == "stop":
        await lifecycle.stop(sandbox_id)
    elif errand == "start":
        await lifecycle.start(sandbox_id)
    elif errand == "destroy":
        await lifecycle.destroy(sandbox_id)
    elif errand == "limit":
        await lifecycle.network_policies.change(sandbox_id, lambda _: LISTED)


def run_managers(folder: Path, log: Path, errands: Connection) -> None:
    """Until the other end of the connection is closed."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    (folder / "resources").mkdir()
    with suppress(EOFError):
        while True:
            errand, name, place = errands.recv()
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    asyncio.run(run_manager(folder, errand, name, place))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            errands.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
