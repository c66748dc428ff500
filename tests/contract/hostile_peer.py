"""A program that stands in for a VMM whose guest is hostile: ``python -m tests.contract.hostile_peer SOCKET ATTACK``.

It listens at SOCKET and attacks whoever connects, again and again, as fast as it can. A process of its own, so that
its flood does not slow the honest side of the test. ``tests/vm/hostile_guest.py`` runs the same attacks inside a guest.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Protocol

from atelier.guest_protocol import frames
from atelier.guest_protocol.frames import FRAME_HEADER, MAGIC, Greeting, ReceiveBuffer, encode_greeting

BLOCK_BYTES = 64 * 1024
_HEADER_BEFORE_PORT_BYTES = 10
"""epoch, type, reason, stream: see ``FRAME_HEADER``."""


class Connection(Protocol):
    """What an attack needs of a socket, or of the port inside a guest. A host that hung up is an OSError."""

    def recv(self, bufsize: int, /) -> bytes: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def sendall(self, data: bytes, /) -> None: ...


def greeting_of(kind: int, nonce: bytes) -> bytes:
    return encode_greeting(Greeting(kind, 1, nonce))


def frame(epoch: int, kind: int, stream: int, value: int = 0) -> bytes:
    return FRAME_HEADER.pack(epoch, kind, 0, stream, value, MAGIC)


def data(epoch: int, stream: int, payload: bytes) -> bytes:
    trailer = frames.TRAILER.pack(frames.trailer_of(epoch))
    return frame(epoch, frames.DATA, stream, len(payload)) + payload + trailer


def await_hello(connection: Connection) -> bytes:
    buffer = ReceiveBuffer()
    while True:
        count = connection.recv_into(buffer.space())
        if count == 0:
            raise ConnectionError
        buffer.received(count)
        while True:
            greeting, skipped, _ = buffer.scan_for_greeting()
            if greeting is not None:
                return greeting.nonce
            if not skipped:
                break


def open_epoch(connection: Connection) -> int:
    nonce = await_hello(connection)
    connection.sendall(greeting_of(frames.HELLO_ACK, nonce))
    return frames.epoch_of(nonce)


def await_open(connection: Connection, epoch: int) -> None:
    """Accept stream 1 once it is opened, whatever its port. What else comes is thrown away."""
    wanted = FRAME_HEADER.pack(epoch, frames.OPEN, 0, 1, 0, MAGIC)[:_HEADER_BEFORE_PORT_BYTES]
    seen = b""
    while wanted not in seen:
        received = connection.recv(65536)
        if not received:
            raise ConnectionError
        seen = (seen + received)[-200_000:]
    connection.sendall(frame(epoch, frames.OPENED, 1))


def blocks(piece: bytes) -> Iterator[bytes]:
    """``piece`` for ever, in large writes."""
    return repeat(piece * max(1, BLOCK_BYTES // len(piece)))


def random_for_ever(connection: Connection) -> Iterator[bytes]:
    return blocks(os.urandom(BLOCK_BYTES))


def zeros_for_ever(connection: Connection) -> Iterator[bytes]:
    return blocks(bytes(BLOCK_BYTES))


def knocks_for_ever(connection: Connection) -> Iterator[bytes]:
    return blocks(greeting_of(frames.KNOCK, os.urandom(16)))


def damaged_greetings(connection: Connection) -> Iterator[bytes]:
    damaged = bytearray(greeting_of(frames.HELLO_ACK, bytes(16)))
    damaged[-1] ^= 1
    return blocks(bytes(damaged))


def cut_greetings(connection: Connection) -> Iterator[bytes]:
    return blocks(greeting_of(frames.HELLO_ACK, bytes(16))[:32])


def parts_of_the_nonce(connection: Connection) -> Iterator[bytes]:
    return blocks(greeting_of(frames.HELLO_ACK, await_hello(connection))[:-5])


def epochs_without_end(connection: Connection) -> Iterator[bytes]:
    while True:
        open_epoch(connection)
        yield greeting_of(frames.KNOCK, os.urandom(16))


def a_million_streams(connection: Connection) -> Iterator[bytes]:
    epoch = open_epoch(connection)
    for stream in range(1_000_000):
        yield data(epoch, stream, b"x")


def opens_from_the_guest(connection: Connection) -> Iterator[bytes]:
    return blocks(frame(open_epoch(connection), frames.OPEN, 1, 80))


def a_length_of_4_gib(connection: Connection) -> Iterator[bytes]:
    epoch = open_epoch(connection)
    await_open(connection, epoch)
    yield frame(epoch, frames.DATA, 1, 0xFFFFFFFF)
    yield from blocks(bytes(BLOCK_BYTES))


def window_overrun(connection: Connection) -> Iterator[bytes]:
    epoch = open_epoch(connection)
    await_open(connection, epoch)
    return blocks(data(epoch, 1, bytes(60_000)))


def tiny_frames(connection: Connection) -> Iterator[bytes]:
    epoch = open_epoch(connection)
    await_open(connection, epoch)
    # As many as the window allows: then the stream stalls, as its client does not read.
    yield data(epoch, 1, b"x") * 250_000
    yield from silence(connection)


def credit_flood(connection: Connection) -> Iterator[bytes]:
    epoch = open_epoch(connection)
    await_open(connection, epoch)
    return blocks(frame(epoch, frames.WINDOW, 1, 20_000))


def ends_for_ever(connection: Connection) -> Iterator[bytes]:
    epoch = open_epoch(connection)
    await_open(connection, epoch)
    return blocks(frame(epoch, frames.EOF, 1))


def silence(connection: Connection) -> Iterator[bytes]:
    """Never reads, never writes."""
    while True:
        time.sleep(1)
        yield b""


def silence_in_an_epoch(connection: Connection) -> Iterator[bytes]:
    epoch = open_epoch(connection)
    await_open(connection, epoch)
    return silence(connection)


def hang_up_at_once(connection: Connection) -> Iterator[bytes]:
    return iter(())


ATTACKS: dict[str, Callable[[Connection], Iterator[bytes]]] = {
    attack.__name__: attack
    for attack in (
        random_for_ever,
        zeros_for_ever,
        knocks_for_ever,
        damaged_greetings,
        cut_greetings,
        parts_of_the_nonce,
        epochs_without_end,
        a_million_streams,
        opens_from_the_guest,
        a_length_of_4_gib,
        window_overrun,
        tiny_frames,
        credit_flood,
        ends_for_ever,
        silence,
        silence_in_an_epoch,
        hang_up_at_once,
    )
}


def main(path: str, attack: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path + ".new")
        listener.listen(8)
        Path(path + ".new").rename(path)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                for piece in ATTACKS[attack](connection):
                    connection.sendall(piece)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
