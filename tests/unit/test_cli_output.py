"""What the CLI prints and how it reads its arguments, without a manager."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from atelier.cli.__main__ import COMMANDS, cli
from atelier.cli.console_follower import ConsoleFollower, overlap
from atelier.cli.copying import RemotePlace, parse_place
from atelier.cli.describing import list_trouble, show_expiry, show_limits, show_state
from atelier.cli.execution import exit_status, status_of_failure
from atelier.cli.invocation import BYTES, DURATION, DURATION_OR_NEVER, MEBIBYTES, PAIR
from atelier.cli.output import printable, printable_block, show_age, show_bytes, show_duration, show_mebibytes
from atelier.model.errors import AtelierError
from atelier.model.states import SandboxState, StopReason
from atelier.schemas.errors import ErrorBody
from atelier.schemas.sandboxes import Sandbox


@pytest.mark.parametrize(
    "hostile",
    ["\x1b]0;owned\x07", "\x1b[2J", "a\rb", "\x9b31m", "a\nb", "\u202eabc", "\u2028", "\x7f", "\x00", "\udcff"],
)
def test_what_a_terminal_would_obey_is_escaped(hostile: str) -> None:
    shown = printable(hostile)
    assert shown.isprintable()
    assert shown.isascii()
    block = printable_block(f"x\n{hostile}\ty")
    assert all(char.isprintable() or char in "\n\t" for char in block)


def test_plain_text_stays_plain() -> None:
    assert printable("größe 漢字 a\\b") == "größe 漢字 a\\b"
    assert printable_block("a\r\nb\tc") == "a\nb\tc"


def test_sizes_and_ages_read_well() -> None:
    now = datetime(2024, 1, 2, tzinfo=UTC)
    assert [show_age(now - timedelta(seconds=s), now) for s in (0, 59, 60, 7200, 200_000)] == [
        "0s",
        "59s",
        "1m",
        "2h",
        "2d",
    ]
    assert show_age(now + timedelta(hours=1), now) == "0s"
    assert [show_bytes(n) for n in (0, 1023, 1024, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [show_mebibytes(n) for n in (512, 1024, 1536)] == ["512 MiB", "1 GiB", "1536 MiB"]


@pytest.mark.parametrize(
    ("text", "mib"), [("512", 512), ("512M", 512), ("2g", 2048), ("1.5GiB", 1536), ("1T", 1 << 20)]
)
def test_sizes_are_understood(text: str, mib: int) -> None:
    assert MEBIBYTES.convert(text, None, None) == mib


@pytest.mark.parametrize("text", ["", "x", "-1", "1.3", "1.0001G", "1K", "1e3", "5 5"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        MEBIBYTES.convert(text, None, None)


def test_bytes_and_pairs_are_understood() -> None:
    assert [BYTES.convert(text, None, None) for text in ("10", "64K", "32GiB")] == [10, 65536, 32 << 30]
    assert PAIR.convert("A=b=c", None, None) == ("A", "b=c")
    for text in ("A", "=x"):
        with pytest.raises(click.BadParameter):
            PAIR.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1D", 86400), ("1h30m", 5400), ("1d 2h", 93600)]
)
def test_durations_are_understood(text: str, seconds: int) -> None:
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "5", "0s", "1y", "-1h", "1.5h", "30m1h", "never", "1" * 30 + "d"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        DURATION.convert(text, None, None)


def test_never_is_a_duration_where_it_takes_a_limit_away() -> None:
    assert DURATION_OR_NEVER.convert("Never", None, None) == "never"
    assert DURATION_OR_NEVER.convert("2m", None, None) == 120


def test_durations_read_well() -> None:
    assert [show_duration(n) for n in (0, 45, 60, 1200, 4800, 3601, 90000, 86400 * 3 + 59)] == [
        "0s", "45s", "1m", "20m", "1h 20m", "1h", "1d 1h", "3d",
    ]  # fmt: skip
    now = datetime(2024, 1, 2, tzinfo=UTC)
    assert show_expiry(now + timedelta(minutes=80), now) == "expires in 1h 20m"
    assert show_expiry(now + timedelta(seconds=7199.9), now) == "expires in 2h"
    assert show_expiry(now - timedelta(seconds=1), now) == "has expired"
    assert show_expiry(None, now) == ""


def sandbox(state: SandboxState, **fields: Any) -> Sandbox:
    now = datetime.now(UTC)
    return Sandbox(
        id="abcdefghijkl", name="box", state=state, image="base", image_id="", vcpu_count=1, memory_mib=512,
        disk_mib=4096, labels={}, created_at=now, updated_at=now, **fields,
    )  # fmt: skip


def test_a_state_comes_with_its_reason() -> None:
    stuck = ErrorBody(code="stop_stuck", message="stuck while being stopped: x", hint="mend, then: atelier retry box")
    failed = ErrorBody(code="vmm_ended", message="it ended")
    assert show_state(sandbox(SandboxState.RUNNING)) == "running"
    assert show_state(sandbox(SandboxState.STOPPED, stop_reason=StopReason.REQUESTED)) == "stopped"
    assert show_state(sandbox(SandboxState.STOPPED, stop_reason=StopReason.IDLE)) == "stopped (idle)"
    assert show_state(sandbox(SandboxState.STOPPED, stop_reason=StopReason.FORCED)) == "stopped (cut off)"
    assert show_state(sandbox(SandboxState.STOPPING, failure=stuck)) == "stopping (stuck)"
    assert show_state(sandbox(SandboxState.FAILED, failure=failed)) == "failed"
    assert list_trouble(sandbox(SandboxState.STOPPING, failure=stuck)) == [
        ("trouble", "stuck while being stopped: x [stop_stuck]"),
        ("hint", "mend, then: atelier retry box"),
    ]
    assert list_trouble(sandbox(SandboxState.FAILED, failure=failed)) == [("failed", "it ended [vmm_ended]")]
    assert show_limits(sandbox(SandboxState.RUNNING, auto_stop_after_idle_seconds=90)) == "stops when idle for 1m 30s"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("box:/a", RemotePlace("box", b"/a")),
        ("box:", RemotePlace("box", b".")),
        ("box:a:b", RemotePlace("box", b"a:b")),
        ("box:\udcff", RemotePlace("box", b"\xff")),
        ("./box:a", "./box:a"),
        ("/x:y", "/x:y"),
        ("A:b", "A:b"),
        (":a", ":a"),
        ("-", "-"),
        ("file", "file"),
    ],
)
def test_the_sides_of_a_copy_are_told_apart(text: str, expected: object) -> None:
    assert parse_place(text) == expected


@pytest.mark.parametrize(
    ("path", "name", "must_be_folder", "means_content"),
    [
        (b"/a/b", b"b", False, False),
        (b"/a/b/", b"b", True, False),
        (b"/a/.", b"", True, True),
        (b".", b"", True, True),
        (b"..", b"", True, False),
        (b"/", b"", True, True),
    ],
)
def test_what_a_path_in_a_sandbox_means(path: bytes, name: bytes, must_be_folder: bool, means_content: bool) -> None:
    place = RemotePlace("box", path)
    assert (place.name, place.must_be_folder, place.means_content) == (name, must_be_folder, means_content)


@pytest.mark.parametrize(("code", "status"), [(0, 0), (1, 1), (255, 255), (137, 137), (256, 1), (-1, 255), (512, 1)])
def test_exit_codes_fit_an_exit_status_and_failure_stays_failure(code: int, status: int) -> None:
    assert exit_status(code) == status


@pytest.mark.parametrize(
    ("code", "status"),
    [("program_not_found", 127), ("program_not_executable", 126), ("sandbox_not_found", 125), ("", 125)],
)
def test_a_program_that_cannot_be_started_ends_as_in_a_shell(code: str, status: int) -> None:
    assert status_of_failure(AtelierError("m", code=code)) == status


def test_a_console_is_followed_without_repeating_or_losing_anything() -> None:
    written = b"".join(b"line %d\n" % number for number in range(4000))
    follower, shown, window = ConsoleFollower(), b"", 5000
    for end in (0, 10, 10, 3000, 4999, 5000, 5001, 9000, 13999, 20000, 20001, 24000):
        new = follower.take(written[max(0, end - window) : end])
        if end == 20000:
            # More came than one window holds: the gap cannot be filled, but what is there is shown.
            assert new == written[15000:20000]
            shown = written[:15000]
        shown += new
        assert shown == written[:end]
    assert overlap(b"", b"abc") == 0
    assert overlap(b"xxab", b"abc") == 2
    assert overlap(b"aaaa", b"aaaaab") == 4


def test_help_names_every_command_and_imports_nothing_slow(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv=['atelier','--help']\n"
        "from atelier.cli.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code in (0, None), e.code\n"
        "slow={'httpx','pydantic','rich','asyncio','websockets','atelier.client','sqlalchemy','fastapi'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def _commands() -> Iterator[str]:
    """All that do something; a group only leads to others, or does what the first of these does."""
    for name in COMMANDS:
        if name == "host":
            continue  # it becomes another program, in whoever's process it is called
        command = cli.get_command(click.Context(cli), name)
        if isinstance(command, click.Group):
            yield from (f"{name} {verb}" for verb in command.commands)
        else:
            yield name


@pytest.mark.parametrize("name", list(_commands()))
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    result = CliRunner().invoke(cli, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "--json" in result.output
    assert "atelier " + name in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"], ["ls", "--nonsense"], ["exec", "box"], ["exec", "box", "--"], ["cp", "a", "b"], ["cp", "a:b", "c:d"],
        ["rm"], ["rm", "--all", "box"], ["create", "--memory", "x"], ["exec", "-i", "-n", "box", "true"],
        ["logs", "--bytes", "2M", "box"], ["logs", "--json", "-f", "box"], ["shell", "box"], ["exec", "-t", "box", "true"],
        ["shell", "--attach", "3", "box", "ls"], ["up", "--mode", "x"], ["stop"], ["start"], ["stop", "--grace", "-1", "box"],
        ["resize", "box"], ["extend", "box"], ["extend", "box", "5"], ["create", "--expires-in", "never"],
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_two_and_says_why(arguments: list[str], tmp_path: Path) -> None:
    result = invoke(arguments, tmp_path)
    assert result.exit_code == 2, result.output
    assert "Error:" in result.stderr


def no_manager(folder: Path) -> dict[str, str | None]:
    # An address where nobody listens: these tests must not depend on a manager that happens to run.
    return {"ATELIER_DATA_DIR": str(folder), "ATELIER_API_URL": "http://127.0.0.1:9", "ATELIER_API_KEY": "k"}


def invoke(arguments: list[str], folder: Path) -> Result:
    return CliRunner().invoke(cli, arguments, env=no_manager(folder))


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["ls"], 1), (["get", "box"], 1), (["create"], 1), (["rm", "box"], 1), (["logs", "box"], 1), (["image", "ls"], 1),
     (["events"], 1), (["cp", "box:x", "."], 1), (["exec", "box", "true"], 125), (["stop", "box"], 1),
     (["resize", "box", "8G"], 1), (["extend", "box", "2h"], 1), (["doctor", "--reclaim"], 1)],
)  # fmt: skip
def test_no_manager_is_said_with_the_remedy(arguments: list[str], status: int, tmp_path: Path) -> None:
    result = invoke(arguments, tmp_path)
    assert result.exit_code == status
    assert result.stderr.startswith("error: ")
    assert "hint: start it with `atelier up`" in result.stderr


@pytest.mark.parametrize("arguments", [["ls"], ["get", "box"], ["image", "ls"], ["exec", "box", "true"]])
def test_errors_are_json_for_who_asked_for_json(arguments: list[str], tmp_path: Path) -> None:
    words = (
        [*arguments[:-1], "--json", *arguments[-1:]] if arguments[0] != "exec" else ["exec", "--json", "box", "true"]
    )
    result = invoke(words if len(arguments) > 1 and arguments[0] != "image" else [*arguments, "--json"], tmp_path)
    assert json.loads(result.stderr)["code"] == "manager_unreachable"


def test_the_program_ends_in_words_and_not_in_a_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, **no_manager(tmp_path)}
    for arguments, status in ((["ls"], 1), (["nonsense"], 2), (["version"], 0), (["exec", "box", "true"], 125)):
        done = subprocess.run(
            [sys.executable, "-m", "atelier.cli", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status
        assert "Traceback" not in done.stderr


def test_completion_knows_the_commands(tmp_path: Path) -> None:
    environment = os.environ | {"_ATELIER_COMPLETE": "bash_complete", "COMP_WORDS": "atelier ", "COMP_CWORD": "1"}
    script = Path(sys.executable).with_name("atelier")
    done = subprocess.run([script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert {line.partition(",")[2] for line in done.stdout.split()} == set(COMMANDS)
