"""The guest agent, reached through the gateway over the socket that the (fake) Firecracker offers for a vsock."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.contract.agent_fixture import SOURCE
from tests.fake_firecracker.document import NO_DOCUMENT
from tests.firecracker_machines import FirecrackerStand
from tests.gateway_program import PATIENCE_SECONDS, Gateway, until

from atelier.drivers.guest.agent import AgentGuests

pytestmark = pytest.mark.skipif(bool(NO_DOCUMENT), reason=NO_DOCUMENT)

SANDBOX = "aaaaaaaaaaaa"
TOKEN = "a token of this sandbox's"


@contextlib.asynccontextmanager
async def _agent(socket: Path) -> AsyncIterator[None]:
    """The real agent, as a process; ``socket`` stands for its vsock."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c"),
        f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from atelier.guest_agent.__main__ import main; sys.exit(main())",
        *("--channel", f"unix:{socket}", "--no-system", "--default-user", "root"),
    )
    await until(socket.exists)
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def test_the_agent_answers_over_vsock_and_again_after_a_snapshot() -> None:
    # Not pytest's folder: its path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="atelier-fire-"))
    stand = FirecrackerStand(folder, "fire", agent=folder / "agent.sock")
    gateway = Gateway(folder / "run")
    guests = AgentGuests(gateway.layout.channel_socket, gateway.layout.gateway_socket)
    try:
        async with _agent(folder / "agent.sock"):
            await gateway.start()
            spec = stand.spec(SANDBOX)
            endpoint = stand.vmm.guest_endpoint(spec.run_directory)
            # As the lifecycle does: before there is a machine.
            await guests.ensure_channel(SANDBOX, endpoint, TOKEN)
            await stand.started(spec)
            await guests.wait_ready(SANDBOX, PATIENCE_SECONDS)
            assert (await guests.stat(SANDBOX, b"/")).raw_path == b"/"
            epochs = (await gateway.channel(SANDBOX))["epochs"]
            answered: list[bytes] = []

            async def ask() -> None:
                answered.append((await guests.stat(SANDBOX, b"/")).raw_path)

            await stand.vmm.save(spec.run_directory, folder / "saved", before_stop=ask)
            await stand.vmm.go_on(spec.run_directory)
            await guests.wait_ready(SANDBOX, PATIENCE_SECONDS)
            await ask()
            assert answered == [b"/", b"/"]
            channel = await gateway.channel(SANDBOX)
            assert channel["epochs"] > epochs, "a snapshot ends what is connected"
            assert channel["violations"] == 0
            assert stand.breaches() == []
    finally:
        await guests.close()
        await stand.vmm.ensure_stopped(SANDBOX, folder / SANDBOX, None)
        if gateway.process is not None:
            await gateway.stop()
        shutil.rmtree(folder)
