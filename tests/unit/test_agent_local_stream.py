"""A server in the agent's process on a stream of the guest channel: two multiplexers wired together in memory."""

import asyncio
import errno
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from atelier.guest_agent.local_stream import LocalTransport, serve_locally
from atelier.guest_agent.output_pipes import OutputPipes
from atelier.guest_protocol import frames
from atelier.guest_protocol.multiplexer import Multiplexer
from atelier.guest_protocol.stream import FULL_WINDOW_BYTES, Stream

PATIENCE_SECONDS = 30.0

Serve = Callable[[LocalTransport], Awaitable[None]]


class Client:
    """The host's end: a stream to a server that is ``serve`` in this process. ``reads`` False: it takes nothing."""

    def __init__(self, serve: Serve, pipe: OutputPipes | None = None) -> None:
        self.pipe = pipe or OutputPipes()
        self.data = bytearray()
        self.reads = True
        self.closed_with: int | None = None
        self._serve = serve
        self.host = Multiplexer(on_output=lambda: None, on_greeting=print)
        self.guest = Multiplexer(
            on_output=lambda: None, on_greeting=print, accept=self._accept, on_forgotten=self.pipe.forget
        )
        nonce = os.urandom(16)
        self.host.begin_epoch(nonce)
        self.guest.begin_epoch(nonce)
        self.task: asyncio.Task[None] | None = None
        stream = self.host.open(1, self)
        assert stream is not None
        self.stream = stream

    def _accept(self, stream: Stream) -> None:
        async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert isinstance(writer.transport, LocalTransport)
            await self._serve(writer.transport)

        self.task = serve_locally(asyncio.get_running_loop(), stream, serve, self.pipe)

    def opened(self) -> None: ...

    def may_send(self) -> None: ...

    def received_end(self) -> None: ...

    def received(self, payload: memoryview) -> None:
        self.data += payload
        if self.reads:
            self.stream.consumed(len(payload))

    def closed(self, reason: int) -> None:
        self.closed_with = reason

    async def turn(self) -> None:
        """Carry what there is both ways, and let the server run."""
        for source, sink in ((self.host, self.guest), (self.guest, self.host)):
            while chunk := self._next(source):
                sink.receive_buffer.space()[: len(chunk)] = chunk
                sink.receive_buffer.received(len(chunk))
                source.wrote(len(chunk))
                source.offer_room()
                sink.process()
        await asyncio.sleep(0)

    def _next(self, source: Multiplexer) -> bytes:
        """Any number: a write may stop anywhere."""
        piped = source.next_piped()
        if not piped:
            return b"".join(source.next_pieces())[:50_001]
        port_read, port_write = os.pipe()
        with os.fdopen(port_read, "rb") as there, os.fdopen(port_write, "wb"):
            return os.read(there.fileno(), self.pipe.give_to(port_write, min(piped, 50_001)))

    async def turn_until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not done():
                await self.turn()


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = os.urandom(3 * FULL_WINDOW_BYTES + 12_345)
    (tmp_path / "file").write_bytes(data)
    return data


@pytest.fixture
async def file(content: bytes, tmp_path: Path) -> AsyncIterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


class NoPages(OutputPipes):
    """Of a kernel that moves no pages of this file."""

    def take_frame(self, descriptor: int, position: int, wanted: int, edges: tuple[bytes, bytes]) -> int:
        raise OSError(errno.EINVAL, "no splice")


class SmallPipes(OutputPipes):
    """Of a user who may have no larger ones."""

    def _open(self) -> int:
        read_end = super()._open()
        fcntl.fcntl(read_end, fcntl.F_SETPIPE_SZ, 64 * 1024)
        return read_end


@pytest.mark.parametrize("pipe", [OutputPipes, NoPages, SmallPipes])
async def test_a_file_goes_out_behind_what_was_written_before(
    file: int, content: bytes, pipe: type[OutputPipes]
) -> None:
    before = os.urandom(400_000)

    async def serve(transport: LocalTransport) -> None:
        transport.write(before)
        await transport.send_file(file, 1000, len(content) - 1000)
        transport.write(b"after")

    client = Client(serve, pipe())
    await client.turn_until(lambda: client.closed_with is not None)
    assert client.data == before + content[1000:] + b"after"
    assert client.closed_with == frames.CLOSED_DONE


async def test_a_reader_that_stalls_holds_the_file_up(file: int, content: bytes) -> None:
    client = Client(lambda transport: transport.send_file(file, 0, len(content)))
    client.reads = False
    for _ in range(100):
        await client.turn()
    held = len(client.data)
    assert 0 < held <= FULL_WINDOW_BYTES
    assert client.task is not None and not client.task.done()
    client.reads = True
    client.stream.consumed(held)
    await client.turn_until(lambda: client.closed_with is not None)
    assert client.data == content


@pytest.mark.parametrize("missing", [1, 2 * FULL_WINDOW_BYTES])
async def test_a_file_shorter_than_promised_is_an_error(file: int, content: bytes, missing: int) -> None:
    errors: list[Exception] = []

    async def serve(transport: LocalTransport) -> None:
        try:
            await transport.send_file(file, missing, len(content))
        except OSError as error:
            errors.append(error)

    client = Client(serve)
    await client.turn_until(lambda: client.closed_with is not None)
    assert client.data == content[missing:]
    assert [type(error) for error in errors] == [ConnectionAbortedError]


@pytest.mark.parametrize("how", ["close", "end of the epoch"])
async def test_a_client_that_goes_away_ends_it(file: int, content: bytes, how: str) -> None:
    errors: list[Exception] = []

    async def serve(transport: LocalTransport) -> None:
        try:
            await transport.send_file(file, 0, len(content))
        except OSError as error:
            errors.append(error)

    client = Client(serve)
    client.reads = False
    for _ in range(20):
        await client.turn()
    assert client.task is not None and not client.task.done()
    if how == "close":
        client.stream.close()
    else:
        client.guest.end_epoch()
    await client.turn_until(client.task.done)
    assert [type(error) for error in errors] == [ConnectionResetError]


async def test_what_of_a_file_was_not_sent_is_not_taken_for_the_next_epochs(file: int, content: bytes) -> None:
    client = Client(lambda transport: transport.send_file(file, 0, len(content)))
    # It is accepted, and its file's first frames lie in the pipe.
    while not client.guest.next_piped():
        for source, sink in ((client.host, client.guest), (client.guest, client.host)):
            chunk = b"".join(source.next_pieces()) if not source.next_piped() else b""
            sink.receive_buffer.space()[: len(chunk)] = chunk
            sink.receive_buffer.received(len(chunk))
            source.wrote(len(chunk))
            sink.process()
        await asyncio.sleep(0)
    nonce = os.urandom(16)
    client.host.begin_epoch(nonce)
    client.guest.begin_epoch(nonce)
    client.host.receive_buffer.clear()
    client.closed_with = None
    again = client.host.open(1, client)
    assert again is not None
    client.stream = again
    await client.turn_until(lambda: client.closed_with is not None)
    assert client.data == content
