"""Lines, events and process output: reading streams piece by piece."""

from __future__ import annotations

import json

import pytest

from atelier.client import calls
from atelier.client.events import EventParser
from atelier.client.line_splitter import LineSplitter
from atelier.model.errors import AtelierError, CapacityError, NotFoundError
from atelier.model.guest import ProcessEnded, ProcessOutput, ProcessStarted


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_come_whole_however_they_are_cut(size: int) -> None:
    text = '{"a": "\u2028\x85"}\n\n{"b": 2}\r\n{"c": 3}\n'.encode()
    splitter = LineSplitter()
    lines = [line for start in range(0, len(text), size) for line in splitter.feed(text[start : start + size])]
    assert lines == ['{"a": "\u2028\x85"}'.encode(), b'{"b": 2}\r', b'{"c": 3}']
    assert not splitter.has_rest()


def test_a_line_without_end_is_bounded_and_half_a_line_is_noticed() -> None:
    splitter = LineSplitter(max_bytes=100)
    with pytest.raises(AtelierError):
        for _ in range(30):
            list(splitter.feed(b"x" * 10))
    rest = LineSplitter()
    assert list(rest.feed(b'{"a"')) == []
    assert rest.has_rest()


def test_process_events_become_values() -> None:
    parse = calls.process_event_parser("run it")
    assert parse(b'{"type":"started","pid":7}') == ProcessStarted(7)
    assert parse(b'{"type":"output","stream":"stderr","data":"AP8="}') == ProcessOutput("stderr", b"\x00\xff")
    ended = parse(b'{"type":"ended","exit_code":137,"status":"signal: killed","error":"timeout"}')
    assert ended == ProcessEnded(137, "signal: killed", "timeout")


def test_a_failed_line_raises_what_it_says() -> None:
    parse = calls.process_event_parser("run it")
    with pytest.raises(CapacityError) as caught:
        parse(b'{"type":"failed","code":"insufficient_capacity","message":"full","hint":"wait"}')
    assert caught.value.hint == "wait"
    with pytest.raises(NotFoundError):
        parse(b'{"type":"failed","code":"process_not_found","message":"gone"}')


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b'{"type":"new"}',
        b'{"type":"output","stream":"stdout","data":"?"}',
        b'{"type":"started"}',
        b"\xff",
    ],
)
def test_what_is_no_event_is_an_error_in_words(line: bytes) -> None:
    with pytest.raises(AtelierError) as caught:
        calls.process_event_parser("run it")(line)
    assert caught.value.code == "unexpected_answer"
    assert caught.value.message.startswith("could not run it")


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_server_sent_events_are_put_together(size: int) -> None:
    text = b': connected\n\nid: 1\nevent: sandbox.created\ndata: {"a":\ndata: 1}\n\nid: 2\ndata: x\r\n\r\n: alive\n\nevent: none\n\ndata: half'
    parser = EventParser()
    events = [event for start in range(0, len(text), size) for event in parser.feed(text[start : start + size])]
    assert [(event.id, event.kind, event.data) for event in events] == [
        ("1", "sandbox.created", '{"a":\n1}'),
        ("2", "", "x"),
    ]


def test_a_streamed_run_sends_only_what_was_asked_for() -> None:
    stream = calls.exec_process(
        "box", "ls | wc", environment=None, working_directory="", user="", timeout_seconds=None, stdin=False
    )
    assert stream.body is not None
    assert json.loads(stream.body) == {"command": ["sh", "-c", "ls | wc"]}


def test_values_against_the_contract_are_refused_in_words_before_anything_is_sent() -> None:
    with pytest.raises(AtelierError) as caught:
        calls.create_sandbox(
            name=None, image=None, vcpu_count=9999, memory_mib=None, disk_mib=None, environment={"1x": "y"}, labels=None,
            wait_seconds=0,
        )  # fmt: skip
    assert caught.value.code == "invalid_request"
    assert "vcpu_count" in caught.value.message
    with pytest.raises(AtelierError):
        calls.exec_process(
            "box",
            ["echo", "\udcff"],
            environment=None,
            working_directory="",
            user="",
            timeout_seconds=None,
            stdin=False,
        )
