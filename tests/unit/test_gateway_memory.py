"""What a guest channel keeps when its sandbox is gone: nothing that counts."""

from __future__ import annotations

import asyncio
import gc
import tempfile
from pathlib import Path

from atelier.gateway.channel import GuestChannel
from atelier.guest_protocol.frames import MAX_FRAME_BYTES


async def test_a_channel_that_ended_has_let_its_memory_go() -> None:
    """Without the garbage collector, which may be long in coming."""
    heard = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(MAX_FRAME_BYTES)
        writer.write(b"no greeting")
        heard.set()
        await reader.read()
        writer.close()

    gc.disable()
    try:
        with tempfile.TemporaryDirectory(prefix="atl-") as folder:
            path = Path(folder) / "vmm.sock"
            async with await asyncio.start_unix_server(serve, str(path)):
                channel = GuestChannel("abcdefghij23", path, "token")
                memory = channel._multiplexer.receive_buffer.memory
                running = asyncio.create_task(channel.run())
                await asyncio.wait_for(heard.wait(), 30)
                assert len(memory) >= MAX_FRAME_BYTES
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()
        assert len(memory) == 0
    finally:
        gc.enable()
