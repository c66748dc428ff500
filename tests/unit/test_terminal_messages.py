"""What a hostile guest may say of its terminals: bounded, or refused as a break of the protocol."""

from __future__ import annotations

from typing import Any

import pytest

from atelier.drivers.guest.terminal_messages import terminal_event, terminal_session, terminal_sessions
from atelier.model.errors import GuestProtocolError
from atelier.model.terminal import TerminalTitled

GOOD: dict[str, Any] = {
    "id": "0a1b2c3d4e5f",
    "title": "build",
    "config": {"cmd": "/bin/sh", "args": ["-l"]},
    "user": "user",
    "size": {"cols": 80, "rows": 24},
    "createdAtMs": "1700000000000",
    "viewers": 1,
    "pid": 77,
}


def test_what_is_proper_is_read() -> None:
    read = terminal_session(GOOD)
    assert (read.id, read.arguments, read.size.columns, read.created_at.year) == (
        GOOD["id"],
        ("/bin/sh", "-l"),
        80,
        2023,
    )


@pytest.mark.parametrize(
    "lie",
    [
        {"id": "../../x"}, {"id": ""}, {"id": "a" * 33}, {"id": 7}, {"size": {"cols": -1, "rows": 24}},
        {"size": {"cols": 1e9, "rows": 24}}, {"size": {"cols": 1001, "rows": 24}}, {"size": {"cols": 80, "rows": 0}},
        {"size": None}, {"createdAtMs": str(2**63)}, {"createdAtMs": -1},
        {"viewers": 10**9}, {"pid": 0}, {"end": []}, {"config": {"args": "x"}}, {"title": "\ud800"},
    ],
)  # fmt: skip
def test_lies_are_refused(lie: dict[str, Any]) -> None:
    with pytest.raises(GuestProtocolError):
        terminal_session({**GOOD, **lie})


def test_a_long_title_is_cut_and_shown_on_one_line() -> None:
    assert terminal_session({**GOOD, "title": "a\n\x1b]b" + "x" * 10**6}).title == "a  ]b" + "x" * 195
    event = terminal_event({"event": {"title": {"title": "y" * 10**6}}})
    assert event == TerminalTitled("y" * 200)


def test_the_user_is_one_short_line() -> None:
    assert terminal_session({**GOOD, "user": "a\x1b[2Jb\n" + "x" * 100}).user == "a [2Jb " + "x" * 57


def test_too_many_are_refused() -> None:
    with pytest.raises(GuestProtocolError):
        terminal_sessions({"terminals": [GOOD] * 257})


@pytest.mark.parametrize(
    "event",
    [
        {"start": {"terminal": GOOD, "viewer": 0}}, {"start": {}}, {"lost": {"bytes": "-1"}}, {"lost": 5},
        {"data": {"pty": "***"}}, {"resize": {"size": {"cols": "many"}}}, {"end": {"exitCode": 1000}}, {"title": "x"},
    ],
)  # fmt: skip
def test_events_that_break_the_protocol(event: dict[str, Any]) -> None:
    with pytest.raises(GuestProtocolError):
        terminal_event({"event": event})


def test_what_says_nothing_is_passed_over() -> None:
    assert terminal_event({"event": {"keepalive": {}}}) is None
    assert terminal_event({}) is None
