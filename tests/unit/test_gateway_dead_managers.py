"""What a manager had asked the gateway for when it died is not done behind the next one's back, and what a killed gateway
had half made is swept away by its successor."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.dead_clients import ask_and_die
from tests.gateway_program import SANDBOX, Gateway

_KILLED_AT = """
import os, pathlib, signal, sys

call, sandbox_id = sys.argv.pop(1), sys.argv.pop(1)
real = getattr(pathlib.Path, call)

def killed(path, target):
    if sandbox_id in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, target)

setattr(pathlib.Path, call, killed)
from atelier.gateway.__main__ import main
sys.exit(main())
"""


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    # Not pytest's own folder: socket paths are short.
    with tempfile.TemporaryDirectory(prefix="atelier-") as path:
        gateway = Gateway(Path(path) / "run")
        yield gateway
        await gateway.stop(signal.SIGKILL)


def attach_request(gateway: Gateway) -> dict[str, str]:
    vmm_socket = gateway.layout.root / "vmm.sock"
    return {"operation": "attach", "sandbox_id": SANDBOX, "socket_path": str(vmm_socket), "token": "token"}


def channel_files(gateway: Gateway) -> list[str]:
    return sorted(path.name for path in gateway.layout.channels.iterdir() if path.name != "gateway.lock")


async def test_a_dead_manager_attaches_and_detaches_nothing(gateway: Gateway) -> None:
    await gateway.start()
    assert gateway.process is not None
    pid, control = gateway.process.pid, gateway.layout.gateway_socket
    ask_and_die(pid, control, **attach_request(gateway))
    # Two rounds: whatever came before them has been served by then.
    for _ in range(2):
        assert (await gateway.ask(operation="list"))["channels"] == []
    assert channel_files(gateway) == []
    await gateway.attach(gateway.layout.root / "vmm.sock")
    ask_and_die(pid, control, operation="detach", sandbox_id=SANDBOX)
    for _ in range(2):
        assert (await gateway.channel())["sandbox_id"] == SANDBOX
    assert channel_files(gateway) == [f"{SANDBOX}.json", f"{SANDBOX}.sock"]


@pytest.mark.parametrize(("call", "made"), [("replace", "its attachment"), ("rename", "its socket")])
async def test_what_a_killed_gateway_half_made_is_swept_away(gateway: Gateway, call: str, made: str) -> None:
    await gateway.start(program=("-c", _KILLED_AT, call, SANDBOX))
    assert gateway.process is not None
    _, writer = await asyncio.open_unix_connection(str(gateway.layout.gateway_socket))
    writer.write(json.dumps(attach_request(gateway)).encode() + b"\n")
    assert await asyncio.wait_for(gateway.process.wait(), 60) == -signal.SIGKILL
    writer.close()
    assert any(not name.endswith((".json", ".sock")) for name in channel_files(gateway)), f"{made} was half made"
    os.unlink(gateway.layout.gateway_socket)
    await gateway.start()
    assert (await gateway.ask(operation="detach", sandbox_id=SANDBOX))["ok"]
    assert channel_files(gateway) == []
