"""Titles and modes in a terminal's output, and where a viewer may begin; and the ring that is read by place."""

from __future__ import annotations

import pytest

from atelier.guest_agent.output_ring import OutputRing
from atelier.guest_protocol.terminal_output import TITLE_MAX_CHARACTERS, TerminalOutput, line_start


def read_in_pieces(data: bytes, size: int) -> TerminalOutput:
    output = TerminalOutput()
    for start in range(0, len(data), size):
        output.read(data[start : start + size], start)
    return output


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", [b"\x07", b"\x1b\\"])
def test_a_title_is_found_however_it_is_cut(size: int, end: bytes) -> None:
    assert read_in_pieces(b"text\x1b]0;Gr\xc3\xbc\xc3\x9fe" + end + b"more\x1b[1m", size).title == "Grüße"


def test_an_endless_title_is_none_and_a_later_one_counts() -> None:
    output = TerminalOutput()
    output.read(b"\x1b]2;", 0)
    for piece in range(200):
        output.read(b"A" * 4096, 4 + piece * 4096)
    assert output.title == ""
    output.read(b"\x1b]2;short\x07", 4 + 200 * 4096)
    assert output.title == "short"


def test_a_title_is_one_short_printable_line() -> None:
    assert read_in_pieces(b"\x1b]2;" + b"x" * 900 + b"\x07", 5000).title == "x" * TITLE_MAX_CHARACTERS
    assert read_in_pieces("\x1b]2;a\u202eb\x07".encode(), 5000).title == "a b"


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_who_begins_in_the_middle_gets_the_modes_that_were_set_before(size: int) -> None:
    output = read_in_pieces(b"\x1b[?1049h\x1b[?25l--\x1b[?25h++", size)
    assert output.opening(0, 9).endswith(b"\x1b[?1049h"), "the cursor's mode comes with what follows"
    assert b"\x1b[?25h" in output.opening(0, 30)
    assert output.opening(0, 0).find(b"?") < 0


def test_modes_that_undo_one_another_come_in_the_order_of_their_changes() -> None:
    output = read_in_pieces(b"\x1b[?1049h\x1b[?1049l\x1b[?47h\x1b[?47l\x1b[?1049h", 7)
    assert output.opening(0, 100).endswith(b"\x1b[?47l\x1b[?1049h"), "the program shows the other screen"


def test_who_has_missed_a_part_gets_what_changed_there_and_a_reset_too() -> None:
    data = b"\x1b[?1049h" + b"." * 100 + b"\x1bc" + b"." * 100 + b"\x1b[?25l" + b"." * 100
    output = read_in_pieces(data, 50)
    assert output.opening(60, 250).endswith(b"\x0f\x1bc\x1b[?25l"), "his screen is the other one still"
    assert output.opening(200, 250).endswith(b"\x0f\x1b[?25l"), "what he saw before the reset may stay"
    assert output.opening(212, 250).endswith(b"\x0f\x1b[?25l"), "of this sequence he has had a part only"


def test_modes_are_few_whatever_is_written() -> None:
    output = TerminalOutput()
    output.read(b"".join(b"\x1b[?%dh" % mode for mode in range(5000)), 0)
    assert len(output.opening(0, 10**6)) < 2000


@pytest.mark.parametrize(
    ("data", "left_out"),
    [(b"half a line\nnext", 12), (b"\xbc\xc3\x9fno line", 1), (b"plain", 0), (b"", 0)],
)
def test_where_a_viewer_may_begin(data: bytes, left_out: int) -> None:
    assert line_start(data) == left_out


def test_the_ring_is_read_from_any_place_that_it_holds() -> None:
    ring = OutputRing(50_000)
    whole = b"".join(b"%05d\n" % number for number in range(20_000))
    for start in range(0, len(whole), 9001):
        ring.append("pty", whole[start : start + 9001])
    assert ring.end == len(whole)
    assert ring.lost_bytes == len(whole) - 50_000
    for position in range(ring.lost_bytes, ring.end, 7777):
        assert ring.read(position, 20_000) == whole[position : position + 20_000]
    assert ring.read(ring.end, 10) == b""
