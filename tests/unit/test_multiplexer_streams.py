"""Two multiplexers wired together in memory: streams, half close, credit, and every rule that a peer can break."""

import os
import random

import pytest

from atelier.guest_protocol import PROTOCOL_VERSION, frames, multiplexer
from atelier.guest_protocol.frames import (
    FRAME_HEADER,
    MAGIC,
    MAX_PAYLOAD_BYTES,
    Greeting,
    LostSync,
    ProtocolViolation,
    encode_greeting,
)
from atelier.guest_protocol.multiplexer import Multiplexer
from atelier.guest_protocol.stream import FULL_WINDOW_BYTES, INITIAL_WINDOW_BYTES, Stream


class Recorder:
    """A StreamEnd that keeps what it is told; with ``reads`` false it never takes what it gets."""

    def __init__(self, *, reads: bool = True) -> None:
        self.reads = reads
        self.stream: Stream | None = None
        self.data = bytearray()
        self.calls: list[str] = []
        self.to_send = b""

    def opened(self) -> None:
        self.calls.append("opened")

    def received(self, payload: memoryview) -> None:
        self.data += payload
        if self.reads and self.stream is not None:
            self.stream.consumed(len(payload))

    def received_end(self) -> None:
        self.calls.append("end")

    def closed(self, reason: int) -> None:
        self.calls.append(f"closed {frames.CLOSE_REASON_NAMES[reason]}")

    def may_send(self) -> None:
        while self.to_send and self.stream is not None and (room := self.stream.sendable_bytes()):
            self.stream.send(self.to_send[:room])
            self.to_send = self.to_send[room:]


class Pair:
    """A host's and a guest's end, and two wires between that move bytes when told to."""

    def __init__(
        self,
        *,
        guest_accepts: bool = True,
        guest_reads: bool = True,
        max_streams: int = 1024,
        version: int = PROTOCOL_VERSION,
    ) -> None:
        self.guest_reads = guest_reads
        self.guest_accepts = guest_accepts
        self.guest_ends: list[Recorder] = []
        self.greetings: list[Greeting] = []
        self.host = Multiplexer(on_output=lambda: None, on_greeting=self.greetings.append, max_streams=max_streams)
        self.guest = Multiplexer(on_output=lambda: None, on_greeting=self.greetings.append, accept=self._accept)
        nonce = os.urandom(16)
        self.host.begin_epoch(nonce, version)
        self.guest.begin_epoch(nonce, version)

    def _accept(self, stream: Stream) -> None:
        end = Recorder(reads=self.guest_reads)
        end.stream, stream.end = stream, end
        self.guest_ends.append(end)
        if self.guest_accepts:
            stream.accept()

    def open(self, port: int = 80, *, reads: bool = True) -> Recorder:
        end = Recorder(reads=reads)
        end.stream = self.host.open(port, end)
        assert end.stream is not None
        return end

    def move(self, piece_bytes: int = 70_000) -> None:
        """Until nothing moves any more."""
        moved = True
        while moved:
            moved = _carry(self.host, self.guest, piece_bytes) | _carry(self.guest, self.host, piece_bytes)


def _carry(source: Multiplexer, sink: Multiplexer, piece_bytes: int) -> bool:
    moved = False
    while pieces := source.next_pieces():
        chunk = b"".join(pieces)[:piece_bytes]
        count = len(chunk)
        sink.receive_buffer.space()[:count] = chunk
        sink.receive_buffer.received(count)
        source.wrote(count)
        source.offer_room()
        sink.process()
        moved = True
    return moved


def give(side: Multiplexer, data: bytes) -> bool:
    space = side.receive_buffer.space()
    space[: len(data)] = data
    side.receive_buffer.received(len(data))
    return side.process()


def frame(side: Multiplexer, kind: int, stream: int, value: int = 0, reason: int = 0, payload: bytes = b"") -> bytes:
    header = FRAME_HEADER.pack(side.epoch, kind, reason, stream, value, MAGIC)
    return header + payload + (frames.TRAILER.pack(frames.trailer_of(side.epoch)) if payload else b"")


def data_frame(side: Multiplexer, stream: int, payload: bytes) -> bytes:
    return frame(side, frames.DATA, stream, len(payload), payload=payload)


def test_both_directions_with_half_close():
    pair = Pair()
    client = pair.open()
    pair.move()
    assert client.calls == ["opened"]
    server = pair.guest_ends[0]
    assert server.stream is not None and server.stream.port == 80
    client.to_send = b"question"
    client.may_send()
    client.stream.send_end()
    pair.move()
    assert (server.data, server.calls) == (b"question", ["end"])
    server.to_send = b"answer"
    server.may_send()
    server.stream.send_end()
    pair.move()
    assert client.data == b"answer"
    assert client.calls[-1] == "closed done"
    assert pair.host.stream_count == pair.guest.stream_count == 0


@pytest.mark.parametrize("piece_bytes", [1, 17, 4096, 131_072])
def test_what_is_sent_arrives_whole_in_any_pieces(piece_bytes: int):
    content = random.Random(piece_bytes).randbytes(30_000 if piece_bytes < 100 else 5_000_000)
    pair = Pair()
    client = pair.open()
    client.to_send = content
    client.may_send()
    pair.move(piece_bytes)
    server = pair.guest_ends[0]
    assert server.data == content
    server.to_send = content
    server.may_send()
    pair.move(piece_bytes)
    assert client.data == content


def test_early_bytes_and_end_arrive_before_the_stream_is_accepted():
    pair = Pair(guest_accepts=False)
    client = pair.open()
    client.stream.send(b"early")
    client.stream.send_end()
    pair.move()
    server = pair.guest_ends[0]
    assert (server.data, server.calls, client.calls) == (b"early", ["end"], [])
    server.stream.accept()
    server.stream.send(b"late")
    server.stream.close()
    pair.move()
    assert (client.data, client.calls) == (b"late", ["opened", "closed done"])


def test_refused_and_reset_reach_the_other_side():
    pair = Pair(guest_accepts=False)
    client = pair.open()
    pair.move()
    pair.guest_ends[0].stream.close(frames.CLOSED_REFUSED)
    pair.move()
    assert client.calls == ["closed refused"]
    other = pair.open()
    pair.move()
    other.stream.close(frames.CLOSED_RESET)
    pair.move()
    assert pair.guest_ends[1].calls == ["closed reset"]
    assert pair.host.stream_count == pair.guest.stream_count == 0


def test_all_orders_of_ending_leave_no_stream_behind():
    for seed in range(300):
        randomness = random.Random(seed)
        pair = Pair()
        client = pair.open()
        pair.move()
        server = pair.guest_ends[0]
        ways = [
            side.stream.send_end if what == "end" else side.stream.close
            for side in (client, server)
            for what in ("end", "close", "send")
            if what != "send"
        ]
        randomness.shuffle(ways)
        for way in ways:
            way()
            if randomness.random() < 0.5:
                pair.move()
        pair.move()
        assert pair.host.stream_count == pair.guest.stream_count == 0, seed


def test_a_reader_that_stalls_bounds_what_is_sent_and_others_go_on():
    pair = Pair()
    stalled, lively = pair.open(reads=False), pair.open()
    pair.move()
    for server in pair.guest_ends:
        server.to_send = bytes(4_000_000)
        server.may_send()
    pair.move()
    assert len(stalled.data) == INITIAL_WINDOW_BYTES
    assert len(lively.data) == 4_000_000
    # Once it reads, it goes on where it was.
    stalled.reads = True
    stalled.stream.consumed(len(stalled.data))
    pair.move()
    assert len(stalled.data) == 4_000_000


def test_widened_windows_have_a_common_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(multiplexer, "WIDENED_BUDGET_BYTES", 2 * (FULL_WINDOW_BYTES - INITIAL_WINDOW_BYTES))
    pair = Pair()
    clients = [pair.open() for _ in range(5)]
    pair.move()
    for server in pair.guest_ends:
        server.to_send = bytes(INITIAL_WINDOW_BYTES)
        server.may_send()
    pair.move()
    for client in clients:
        client.reads = False
        client.data.clear()
    for server in pair.guest_ends:
        server.to_send = bytes(4 * FULL_WINDOW_BYTES)
        server.may_send()
    pair.move()
    wide = [client for client in clients if len(client.data) > INITIAL_WINDOW_BYTES]
    assert len(wide) == 2
    assert all(len(client.data) <= FULL_WINDOW_BYTES for client in clients)


def test_streams_take_turns_when_the_output_is_full():
    pair = Pair()
    ends = [pair.open() for _ in range(4)]
    pair.move()
    for end in ends:
        end.to_send = bytes(3_000_000)
        end.may_send()
    assert pair.host.output_bytes <= 3 * frames.MAX_FRAME_BYTES
    pair.move()
    assert [len(server.data) for server in pair.guest_ends] == [3_000_000] * 4


def test_too_many_streams_are_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch):
    pair = Pair(max_streams=3)
    for _ in range(3):
        pair.open()
    assert pair.host.open(80, Recorder()) is None
    guest_refuses = Pair()
    monkeypatch.setattr(guest_refuses.guest, "_max_streams", 1)
    first, second = guest_refuses.open(), guest_refuses.open()
    guest_refuses.move()
    assert (first.calls, second.calls) == (["opened"], ["closed busy"])
    assert guest_refuses.guest.stream_count == 1


def test_small_frames_are_written_together():
    pair = Pair()
    for _ in range(50):
        pair.open()
    (first,) = pair.host.next_pieces()
    assert len(first) == 50 * frames.HEADER_BYTES


def test_the_end_of_an_epoch_resets_streams_and_forgets_output():
    pair = Pair()
    client = pair.open()
    pair.move()
    client.stream.send(bytes(1000))
    pair.host.end_epoch()
    assert client.calls == ["opened", "closed reset"]
    assert pair.host.next_pieces() == []
    assert client.stream.sendable_bytes() == 0
    client.stream.send_end()
    client.stream.close()
    assert pair.host.next_pieces() == []
    assert pair.host.open(80, Recorder()) is None


def test_a_new_epoch_on_the_same_bytes_resets_the_old_one():
    pair = Pair()
    pair.open()
    pair.move()
    hello = Greeting(frames.HELLO, 1, os.urandom(16), token="t")
    give(pair.guest, encode_greeting(hello))
    assert pair.greetings == [hello]
    pair.guest.begin_epoch(hello.nonce)
    assert pair.guest_ends[0].calls == ["closed reset"]


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 8, 13, 15, 16, 17, 500, 1019])
def test_half_a_frame_and_padding_deliver_nothing_and_the_hello_is_found(cut: int):
    pair = Pair()
    pair.open()
    pair.move()
    half = data_frame(pair.guest, 1, b"x" * 1000)[:cut]
    hello = Greeting(frames.HELLO, 1, os.urandom(16), token="t")
    with pytest.raises(LostSync):
        give(pair.guest, half + frames.PADDING + encode_greeting(hello))
    pair.guest.end_epoch()
    pair.guest.process()
    assert pair.guest_ends[0].data == b""
    assert pair.greetings == [hello]


@pytest.mark.parametrize("cut", range(1, 16))
def test_half_an_open_is_not_an_open(cut: int):
    pair = Pair()
    pair.open(49983)
    whole = b"".join(pair.host.next_pieces())
    with pytest.raises(LostSync):
        give(pair.guest, whole[:cut] + frames.PADDING)
    assert pair.guest_ends == []


def violations():
    d = frames
    yield "unknown stream", lambda h: data_frame(h, 99, b"x")
    yield "a million streams", lambda h: frame(h, d.EOF, 1_000_000)
    yield "guest opens", lambda h: frame(h, d.OPEN, 2, 80)
    yield "empty data", lambda h: frame(h, d.DATA, 1, 0)
    yield "data too long", lambda h: frame(h, d.DATA, 1, MAX_PAYLOAD_BYTES + 1)
    yield "data of 4 GiB", lambda h: frame(h, d.DATA, 1, 0xFFFFFFFF)
    yield "beyond the window", lambda h: data_frame(h, 1, bytes(100_000)) * 3
    yield "data after end", lambda h: frame(h, d.EOF, 1) + data_frame(h, 1, b"x")
    yield "end twice", lambda h: frame(h, d.EOF, 1) * 2
    yield "data after close", lambda h: frame(h, d.CLOSE, 1) + data_frame(h, 1, b"x")
    yield "close twice", lambda h: frame(h, d.CLOSE, 1) * 2
    yield "opened twice", lambda h: frame(h, d.OPENED, 1)
    yield "tiny credit", lambda h: frame(h, d.WINDOW, 1, 1)
    yield "no credit", lambda h: frame(h, d.WINDOW, 1, 0)
    yield "credit overflow", lambda h: frame(h, d.WINDOW, 1, 0xFFFFFFFF)
    yield "credit never due", lambda h: frame(h, d.WINDOW, 1, FULL_WINDOW_BYTES)
    yield "credit flood", lambda h: frame(h, d.WINDOW, 1, 16_384) * 300
    yield "unknown kind", lambda h: frame(h, 77, 1)
    yield "greeting as frame", lambda h: frame(h, d.HELLO, 1)
    yield "unknown reason", lambda h: frame(h, d.CLOSE, 1, reason=200)


@pytest.mark.parametrize(("name", "hostile"), list(violations()), ids=[name for name, _ in violations()])
def test_each_broken_rule_is_a_violation(name: str, hostile):
    pair = Pair()
    pair.open(reads=False)
    pair.move()
    with pytest.raises(ProtocolViolation):
        give(pair.host, hostile(pair.host))


@pytest.mark.parametrize("kind", [frames.DATA, frames.EOF, frames.WINDOW])
def test_nothing_may_come_before_opened(kind: int):
    pair = Pair()
    pair.open()
    hostile = data_frame(pair.host, 1, b"x") if kind == frames.DATA else frame(pair.host, kind, 1, 20_000)
    with pytest.raises(ProtocolViolation):
        give(pair.host, hostile)


def test_garbage_in_an_epoch_loses_sync_and_a_foreign_epoch_too():
    for garbage in (os.urandom(64), bytes(64), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
        with pytest.raises(LostSync):
            give(Pair().host, garbage)
    pair, other = Pair(), Pair()
    with pytest.raises(LostSync):
        give(pair.host, frame(other.host, frames.EOF, 1))


def test_the_frame_budget_stops_and_goes_on():
    pair = Pair()
    end = pair.open()
    pair.move()
    assert give(pair.host, data_frame(pair.host, 1, b"y") * 1000) is False
    end.data.clear()
    side = pair.host
    space = side.receive_buffer.space()
    flood = data_frame(side, 1, b"z") * 1000
    space[: len(flood)] = flood
    side.receive_buffer.received(len(flood))
    assert side.process(max_frames=100) is True
    assert len(end.data) == 100
    while side.process(max_frames=100):
        pass
    assert len(end.data) == 1000


def test_random_bytes_never_do_anything_but_break_or_lose():
    for seed in range(200):
        randomness = random.Random(seed)
        pair = Pair()
        pair.open()
        pair.move()
        valid = frame(pair.host, randomness.randrange(256), 1, randomness.randrange(1 << 32), randomness.randrange(256))
        noise = bytearray(valid * 20 + randomness.randbytes(500))
        for _ in range(randomness.randrange(30)):
            noise[randomness.randrange(len(noise))] = randomness.randrange(256)
        try:
            give(pair.host, bytes(noise))
        except (ProtocolViolation, LostSync):
            pair.host.end_epoch()
        assert pair.host.output_bytes < 100_000


def test_a_large_payload_is_written_from_where_it_lies():
    pair = Pair()
    client = pair.open()
    pair.move()
    payload = os.urandom(100_000)
    client.stream.send(payload)
    pieces = pair.host.next_pieces()
    assert any(piece is payload for piece in pieces)
    assert len(pieces) == 3
    # What was lent out is not added to while it is being written.
    client.stream.send(b"more")
    assert len(pieces[-1]) == frames.TRAILER_BYTES
    pair.move()
    assert pair.guest_ends[0].data == payload + b"more"


def fill(stream: Stream, data: bytes, at: int) -> int:
    """Send what the stream takes of ``data`` from ``at`` on, in packed frames. Returns how far it came."""
    while at < len(data) and (packed := stream.borrow_frame(len(data) - at)) is not None:
        piece = data[at : at + len(packed.payload)]
        packed.payload[: len(piece)] = piece
        stream.send_frame(packed, len(piece))
        at += len(piece)
    return at


def test_packed_frames_are_full_writes_and_their_memory_is_lent_anew():
    pair = Pair()
    client = pair.open()
    pair.move()
    data = os.urandom(3_000_000)
    sent = fill(client.stream, data, 0)
    assert {len(piece) for piece in pair.host.next_pieces()} == {frames.PORT_WRITE_BYTES}
    memories: set[int] = set()
    client.may_send = lambda: None
    while sent < len(data):
        memories |= {id(piece) for piece in pair.host.next_pieces()}
        # An odd number: a write may stop anywhere.
        pair.move(70_001)
        sent = fill(client.stream, data, sent)
    pair.move()
    assert pair.guest_ends[0].data == data
    assert len(memories) <= 3 * 4, "more than three frames were made"


def test_a_packed_frame_waits_for_credit_for_all_of_it():
    pair = Pair(guest_reads=False)
    client = pair.open()
    pair.move()
    asked: list[bool] = []
    client.may_send = lambda: asked.append(True)
    data = bytes(2 * INITIAL_WINDOW_BYTES)
    sent = 0
    for _ in range(3):
        sent = fill(client.stream, data, sent)
        pair.move()
    assert sent == INITIAL_WINDOW_BYTES // frames.PACKED_PAYLOAD_BYTES * frames.PACKED_PAYLOAD_BYTES
    assert client.stream.borrow_frame(1) is not None, "what fits whole may go"
    assert client.stream.borrow_frame(len(data) - sent) is None
    asked.clear()
    server = pair.guest_ends[0]
    server.stream.consumed(len(server.data))
    pair.move()
    assert asked, "credit came and the sender was not told"
    assert client.stream.borrow_frame(len(data) - sent) is not None


def test_a_packed_frame_outlives_no_epoch():
    pair = Pair()
    client = pair.open()
    pair.move()
    packed = client.stream.borrow_frame(10)
    pair.host.end_epoch()
    client.stream.send_frame(packed, 10)
    assert pair.host.next_pieces() == []
    assert client.stream.borrow_frame(10) is None


def test_credit_comes_back_in_few_steps_and_leaves_the_sender_half_a_window():
    pair = Pair()
    client = pair.open()
    pair.move()
    server = pair.guest_ends[0]
    server.to_send = bytes(2 * FULL_WINDOW_BYTES)
    server.may_send()
    pair.move()
    before = pair.guest.frames_received
    total = 16 * FULL_WINDOW_BYTES
    for _ in range(total // 32_768):
        # Consumed at once, so whatever has not been given back yet, the sender may send this much.
        server.to_send = bytes(32_768)
        server.may_send()
        assert not server.to_send
        pair.move()
    assert len(client.data) == 2 * FULL_WINDOW_BYTES + total
    assert pair.guest.frames_received - before <= 2 * total // FULL_WINDOW_BYTES


@pytest.mark.parametrize(("version", "window_bytes"), [(1, 1024 * 1024), (2, FULL_WINDOW_BYTES)])
def test_an_agent_of_the_version_before_is_not_given_more_than_it_takes(version: int, window_bytes: int):
    pair = Pair(version=version)
    client = pair.open()
    pair.move()
    server = pair.guest_ends[0]
    server.to_send = bytes(2 * FULL_WINDOW_BYTES)
    server.may_send()
    pair.move()
    client.reads = False
    server.to_send = bytes(2 * FULL_WINDOW_BYTES)
    server.may_send()
    pair.move()
    ahead_bytes = 2 * FULL_WINDOW_BYTES - len(server.to_send)
    assert window_bytes // 2 < ahead_bytes <= window_bytes
