"""The Connect protocol's framing and bounded JSON, with hostile bytes."""

from __future__ import annotations

import json
import time

import pytest

from atelier.guest_agent.event_stream import data_envelope
from atelier.guest_protocol.connect import (
    FLAG_END_STREAM,
    HTTP_STATUS_OF_CODE,
    MAX_JSON_DEPTH,
    MAX_JSON_ITEMS,
    ConnectError,
    EnvelopeReader,
    decode_json,
    encode_end_stream,
    encode_envelope,
    encode_json,
    parse_end_stream,
    parse_error,
)


def test_envelopes_survive_any_cut() -> None:
    payloads = [b"{}", b'{"a":"' + b"x" * 1000 + b'"}', b""]
    wire = b"".join(encode_envelope(payload) for payload in payloads) + encode_end_stream()
    for size in (1, 2, 7, 100, len(wire)):
        reader = EnvelopeReader()
        seen = [frame for at in range(0, len(wire), size) for frame in reader.feed(wire[at : at + size])]
        reader.finish()
        assert seen == [*((0, payload) for payload in payloads), (FLAG_END_STREAM, b"{}")]


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_come() -> None:
    reader = EnvelopeReader(limit_bytes=100)
    with pytest.raises(ConnectError) as caught:
        list(reader.feed(b"\0" + (101).to_bytes(4, "big")))
    assert caught.value.code == "resource_exhausted"
    with pytest.raises(ConnectError):
        list(EnvelopeReader().feed(b"\0\xff\xff\xff\xff"))


@pytest.mark.parametrize(("flags", "code"), [(0x01, "unimplemented"), (0x03, "unimplemented"), (0x80, "internal")])
def test_compression_and_unknown_flags_are_refused(flags: int, code: str) -> None:
    with pytest.raises(ConnectError) as caught:
        list(EnvelopeReader().feed(encode_envelope(b"{}", flags)))
    assert caught.value.code == code


def test_a_stream_that_ends_inside_an_envelope_is_an_error() -> None:
    reader = EnvelopeReader()
    assert list(reader.feed(encode_envelope(b"{}")[:-1])) == []
    with pytest.raises(ConnectError):
        reader.finish()


def test_errors_go_there_and_back() -> None:
    for code in HTTP_STATUS_OF_CODE:
        reader = EnvelopeReader()
        [(flags, payload)] = reader.feed(encode_end_stream(ConnectError(code, "because")))
        assert flags == FLAG_END_STREAM
        error = parse_end_stream(payload)
        assert error is not None
        assert (error.code, error.message, error.status) == (code, "because", HTTP_STATUS_OF_CODE[code])
    assert parse_end_stream(b"{}") is None


@pytest.mark.parametrize("body", [{}, {"code": 404}, {"code": ["x"], "message": {}}, {"code": "no such code"}])
def test_nonsense_for_an_error_becomes_an_unknown_one(body: dict[str, object]) -> None:
    assert parse_error(body).code == "unknown"
    assert parse_error(body, 404).code == "unimplemented"


def test_a_long_error_message_is_cut() -> None:
    assert len(parse_error({"code": "internal", "message": "x" * 1_000_000}).message) <= 4096


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return b'{"a":' + (opening * depth + closing * depth).encode() + b"}"


def test_depth_is_bounded() -> None:
    assert decode_json(nested(MAX_JSON_DEPTH - 1))
    for depth in (2 * MAX_JSON_DEPTH + 1, 500, 5000, 200_000):
        with pytest.raises(ConnectError) as caught:
            decode_json(nested(depth))
        assert caught.value.code == "invalid_argument"
    with pytest.raises(ConnectError):
        decode_json(nested(300, '{"b":', "}").replace(b":}", b":1}"))
    with pytest.raises(ConnectError):
        decode_json(b"[" * 1_000_000)


def test_brackets_inside_text_and_side_by_side_are_no_depth() -> None:
    message = {"text": "[{" * 1000 + '"\\' * 50, "entries": [{"a": [1], "b": {}} for _ in range(2000)]}
    assert decode_json(json.dumps(message).encode()) == message


@pytest.mark.parametrize("unit", [b'\\"', b"x", b"\\", b'"', b'"\\'])
def test_text_that_is_never_closed_takes_linear_time(unit: bytes) -> None:
    """Looking for its end again from each quote within took 14 s for 16,000 of them, and hours for a whole message."""
    began = time.monotonic()
    with pytest.raises(ConnectError):
        decode_json(b'{"a":' + b"[" * 2 * MAX_JSON_DEPTH + b'"' + unit * 300_000)
    assert time.monotonic() - began < 10


def test_the_number_of_values_is_bounded() -> None:
    for value in (b"[]", b"{}", b"0", b'{"a":1}'):
        with pytest.raises(ConnectError, match="values"):
            decode_json(b'{"a":[' + (value + b",") * MAX_JSON_ITEMS + value + b"]}")
    assert len(decode_json(b'{"a":[' + b"0," * (MAX_JSON_ITEMS - 10) + b"0]}")["a"]) == MAX_JSON_ITEMS - 9
    text = ",[{" * MAX_JSON_ITEMS
    assert decode_json(encode_json({"a": text})) == {"a": text}, "marks inside of text do not count"


@pytest.mark.parametrize(
    "data",
    [b"nonsense", b"[]", b"1", b"null", b'"x"', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":1', b'{"a":"\xff"}', b"\xff\xfe{}",
     b'{"a":' + b"9" * 10_000 + b"}"],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ConnectError) as caught:
        decode_json(data)
    assert caught.value.code == "invalid_argument"


def test_lone_surrogates_pass_as_escapes() -> None:
    # So do file names that are no UTF-8 travel through JSON text.
    message = {"name": b"\xff\xfe.txt".decode("utf-8", "surrogateescape")}
    assert decode_json(encode_json(message)) == message


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 300])
def test_the_data_event_that_is_written_by_hand_is_what_the_encoder_writes(data: bytes) -> None:
    import base64

    for stream in ("stdout", "stderr", "pty"):
        message = {"event": {"data": {stream: base64.b64encode(data).decode()}}}
        assert data_envelope(stream, data) == encode_envelope(encode_json(message))
