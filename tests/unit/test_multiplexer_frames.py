"""The bytes of the guest channel: greetings in garbage, half frames, fixed memory."""

import os
import random

import pytest

from atelier.guest_protocol import frames
from atelier.guest_protocol.frames import Greeting, LostSync, ReceiveBuffer, encode_greeting


def filled(data: bytes) -> ReceiveBuffer:
    buffer = ReceiveBuffer()
    buffer.space()[: len(data)] = data
    buffer.received(len(data))
    return buffer


def hello(token: str = "t") -> Greeting:
    return Greeting(frames.HELLO, 1, os.urandom(16), os.urandom(16), token)


def test_a_payload_is_a_whole_number_of_port_buffers():
    assert frames.MAX_PAYLOAD_BYTES + frames.HEADER_BYTES + frames.TRAILER_BYTES == frames.MAX_FRAME_BYTES
    assert frames.MAX_PAYLOAD_BYTES % (32 * 1024) == 0
    assert frames.FRAME_HEADER.size == frames.HEADER_BYTES


def test_a_packed_frame_is_a_whole_number_of_port_writes():
    assert frames.PACKED_PAYLOAD_BYTES + frames.HEADER_BYTES + frames.TRAILER_BYTES == frames.PACKED_FRAME_BYTES
    assert frames.PACKED_FRAME_BYTES % frames.PORT_WRITE_BYTES == 0
    assert frames.PACKED_PAYLOAD_BYTES <= frames.MAX_PAYLOAD_BYTES


@pytest.mark.parametrize("token", ["", "secret", "ü" * 512])
def test_a_greeting_survives_the_wire(token: str):
    greeting = hello(token)
    buffer = filled(encode_greeting(greeting))
    assert buffer.take_greeting() == greeting
    assert buffer.start == buffer.end


def test_a_token_too_long_is_refused():
    with pytest.raises(ValueError):
        encode_greeting(hello("x" * 1025))


@pytest.mark.parametrize("before", [b"", bytes(100_000), b"\xa7" * 999, b"noise" * 20_000])
def test_a_greeting_is_found_behind_anything(before: bytes):
    greeting = hello()
    found, skipped, clean = filled(before + encode_greeting(greeting)).scan_for_greeting()
    assert (found, skipped) == (greeting, len(before))
    assert clean == (not before.strip(b"\0"))


def test_a_greeting_that_comes_byte_by_byte_is_found_once():
    greeting = hello("token")
    stream = b"\x01garbage" + encode_greeting(greeting) + b"rest"
    buffer = ReceiveBuffer()
    found = None
    for byte in stream:
        buffer.space()[0] = byte
        buffer.received(1)
        if found is None:
            found, _, _ = buffer.scan_for_greeting()
    assert found == greeting
    assert buffer.memory[buffer.start : buffer.end] == b"rest"


def test_a_cut_greeting_followed_by_zeros_gives_way_to_the_next():
    cut, whole = encode_greeting(hello()), hello()
    for length in range(1, len(cut)):
        buffer = filled(cut[:length] + frames.PADDING + encode_greeting(whole))
        found = None
        while found is None:
            found, skipped, _ = buffer.scan_for_greeting()
            assert found is not None or skipped
        assert found == whole


def test_a_damaged_greeting_is_none():
    good = encode_greeting(hello())
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x40
        buffer = filled(bytes(bad))
        try:
            found = buffer.take_greeting()
        except LostSync:
            continue
        # A damaged length can make it look incomplete, a damaged kind is another kind; never another content.
        assert found is None or found._replace(kind=0) == buffer_content(good)._replace(kind=0)


def buffer_content(encoded: bytes) -> Greeting:
    greeting = filled(encoded).take_greeting()
    assert greeting is not None
    return greeting


def test_the_trailer_is_never_zero():
    for nonce in (bytes(16), b"\xff" * 16, os.urandom(16)):
        epoch = frames.epoch_of(nonce)
        assert epoch not in (0, frames.GREETING_EPOCH)
        assert frames.trailer_of(epoch) != 0


def test_the_buffer_keeps_the_order_and_its_size():
    randomness = random.Random(7)
    buffer = ReceiveBuffer(2 * frames.MAX_FRAME_BYTES)
    size = len(buffer.memory)
    sent = taken = b""
    for _ in range(200):
        piece = randomness.randbytes(randomness.randrange(1, 90_000))
        space = buffer.space()
        count = min(len(space), len(piece))
        space[:count] = piece[:count]
        buffer.received(count)
        sent += piece[:count]
        amount = randomness.randrange(0, buffer.end - buffer.start + 1)
        taken += bytes(buffer.memory[buffer.start : buffer.start + amount])
        buffer.start += amount
    taken += bytes(buffer.memory[buffer.start : buffer.end])
    assert taken == sent
    assert len(buffer.memory) == size
