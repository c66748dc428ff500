"""A bare machine that goes on from what was saved: state loaded over QMP, identity and thaw asked for straight on its port.

The same order as a sandbox's restore: link down, identity, link up, thaw. Used by the figures of restores.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from atelier.drivers.network.addresses import mac_address_of
from atelier.drivers.vmm.qemu_arguments import NETWORK_NODE
from atelier.drivers.vmm.qemu_migration import load_state
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.host.disk_files import find_backing
from atelier.lifecycle.ssh_host_key import make_ssh_host_key
from atelier.model.machine import DiskFile
from atelier.model.sandbox import DEFAULT_MEMORY_MIB
from benchmarks.bare_machine import BareMachine, Ingredients, SavedSide, bare_machine
from benchmarks.direct_channel import DirectChannel

_START_SECONDS = 60.0


@dataclass(frozen=True)
class RestoredMachine:
    channel: DirectChannel
    pid: int


@contextlib.contextmanager
def restored_machine(
    folder: Path, ingredients: Ingredients, saved: SavedSide, state: Path, memory_mib: int = DEFAULT_MEMORY_MIB
) -> Generator[RestoredMachine]:
    """A guest that has a new identity and goes on. ``folder``'s name is the machine's."""
    with bare_machine(folder, ingredients, saved=saved, memory_mib=memory_mib) as machine:
        asyncio.run(_load(machine, state, with_memory=saved.memory is None))
        channel = DirectChannel(machine.folder.guest_socket, token="bare")
        try:
            channel.ask("/init", _identity(folder.name))
            asyncio.run(_set_link(machine))
            channel.ask("/atelier.v1.Control/Thaw", {})
            yield RestoredMachine(channel, machine.pid)
        finally:
            channel.close()


def chain_of(top: DiskFile) -> tuple[DiskFile, ...]:
    """A disk's files, nearest first."""
    chain = [top]
    while (below := find_backing(chain[-1])) is not None:
        chain.append(below)
    return tuple(chain)


async def _load(machine: BareMachine, state: Path, *, with_memory: bool) -> None:
    async with await QmpConnection.open(machine.folder.control_socket, timeout_seconds=_START_SECONDS) as control:
        await load_state(control, state, with_memory=with_memory)
        await control.execute("set_link", {"name": NETWORK_NODE, "up": False})
        await control.execute("cont")


async def _set_link(machine: BareMachine) -> None:
    async with await QmpConnection.open(machine.folder.control_socket) as control:
        await control.execute("set_link", {"name": NETWORK_NODE, "up": True})


def _identity(name: str) -> dict[str, object]:
    key = make_ssh_host_key()
    return {
        "hostname": name,
        "machineId": secrets.token_hex(16),
        "accessToken": "bare",
        "entropy": base64.b64encode(secrets.token_bytes(64)).decode(),
        "hostTimeNs": str(time.time_ns()),
        "envVars": {},
        "restored": True,
        "macAddress": mac_address_of(name),
        "generation": str(uuid.uuid4()),
        "hostKey": {"privateKey": key.private_key, "publicKey": key.public_key},
    }
