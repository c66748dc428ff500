"""The closed user network: a guest with it reaches no port of the host, by any address. The same guest on an open
network reaches them all, so the trying is known to work; that one runs in a network namespace of its own.

They mostly wait for what does not answer, so all three run at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.real_machines import NO_QEMU, REPOSITORY, emulated, get_boot_files, machine_spec, missing_programs, with_init
from tests.vm.reachability import (
    FINISHED,
    GATEWAYS,
    GUEST_LIMIT_SECONDS,
    NAMESPACE_ADDRESSES,
    host_addresses,
    listening,
    try_everything,
)

from atelier.drivers.network.user import UserNetwork
from atelier.model.machine import BootFiles

MISSING = NO_QEMU or missing_programs("ip", "unshare")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

SANDBOX = "aaaaaaaaaaaa"
NAMESPACE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]


@dataclass(frozen=True)
class Tried:
    """What each guest told, once it has tried everything."""

    open: Future[dict[str, Any]]
    restricted: Future[dict[str, Any]]
    on_this_host: Future[None]


@pytest.fixture(scope="module")
def tried() -> Iterator[Tried]:
    # Built here if need be: in the namespace there is no network to fetch anything from.
    boot = asyncio.run(get_boot_files())
    folder = Path(tempfile.mkdtemp(prefix="atelier-net-"))
    with ThreadPoolExecutor(3) as pool:
        yield Tried(
            pool.submit(_in_namespace, boot, "open"),
            pool.submit(_in_namespace, boot, "restricted"),
            pool.submit(asyncio.run, _on_this_host(boot, folder)),
        )
    shutil.rmtree(folder)


def _in_namespace(boot: BootFiles, how: str) -> dict[str, Any]:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user may not make network namespaces")
    ran = subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "tests.vm.reachability", how, str(boot.kernel), str(boot.initramfs)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=GUEST_LIMIT_SECONDS + 30,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert FINISHED in told["console"], told["console"]
    return told


async def _on_this_host(boot: BootFiles, folder: Path) -> None:
    vmm = emulated("test", folder)
    with listening() as listeners:
        targets = (*GATEWAYS, "127.0.0.1", *host_addresses())
        trying = with_init(boot, try_everything(targets, listeners.port), folder)
        spec = machine_spec(SANDBOX, "test", trying, folder, network=await UserNetwork().ensure_slot(SANDBOX, 0))
        await vmm.ensure_run_directory(SANDBOX, spec.run_directory)
        identity = await vmm.ensure_started(spec)
        try:
            async with asyncio.timeout(GUEST_LIMIT_SECONDS):
                await vmm.wait_ended(identity)
        finally:
            await vmm.ensure_stopped(SANDBOX, spec.run_directory, identity)
        console = (await vmm.console_tail(spec.run_directory, 20_000)).decode(errors="replace")
        assert FINISHED in console, console
        # The guest's card is up and its neighbour, QEMU itself, answers: it was the ports that were closed.
        assert "GATEWAY PINGED" in console, console
        assert "NAME SERVER ANSWERED" not in console
        assert listeners.reached == set()


def test_on_an_open_network_the_same_guest_reaches_the_host(tried: Tried) -> None:
    reached = set(tried.open.result()["reached"])
    # The gateway is the host's loopback; fec0::2 is ::1.
    expected = {"10.0.2.2", "127.0.0.1", "fec0::2", *NAMESPACE_ADDRESSES}
    missed = {f"{protocol} {target}" for protocol in ("tcp", "udp") for target in expected} - reached
    assert not missed, f"the positive control is broken: {missed} were not reached, only {reached}"


def test_on_the_closed_network_nothing_is_reached_in_a_namespace(tried: Tried) -> None:
    told = tried.restricted.result()
    assert told["reached"] == []
    assert "NAME SERVER ANSWERED" not in told["console"]


def test_a_machine_of_the_driver_reaches_no_port_of_this_host(tried: Tried) -> None:
    tried.on_this_host.result()
