"""Work in a real guest, asked for over the API: programs, input and output, terminals, files, watches, identity."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from atelier import Sandbox
from atelier.client.terminal import Terminal
from atelier.model.errors import AtelierError, NotFoundError
from atelier.model.guest import ProcessEnded, ProcessOutput, TerminalSize

MEGABYTE = 1_000_000


def test_identity(sandbox: Sandbox) -> None:
    assert sandbox.run(["hostname"]).stdout == "shared\n"
    assert sandbox.run(["id", "-un"]).stdout == "user\n"
    assert sandbox.run(["sudo", "id", "-u"]).stdout == "0\n"
    assert re.fullmatch(r"[0-9a-f]{32}\n", sandbox.run(["cat", "/etc/machine-id"]).stdout)
    assert abs(float(sandbox.run(["date", "+%s.%N"]).stdout) - time.time()) < 15
    assert "/opt/shared" in sandbox.run(["cat", "/proc/mounts"]).stdout
    assert sandbox.run(["sudo", "touch", "/opt/shared/x"]).exit_code != 0


def test_pipeline_and_python(sandbox: Sandbox) -> None:
    counted = sandbox.run("printf 'b\\na\\nb\\n' | sort | uniq -c | sort -rn | head -1")
    assert counted.stdout.split() == ["2", "b"]
    assert sandbox.run(["python3", "-c", "import sys; print(sum(range(10**6)))"]).stdout == "499999500000\n"


def test_exit_codes_and_signals(sandbox: Sandbox) -> None:
    assert sandbox.run("exit 7").exit_code == 7
    assert sandbox.run("kill -TERM $$").exit_code == 128 + signal.SIGTERM
    assert sandbox.run("no-such-program").exit_code == 127
    with pytest.raises(NotFoundError, match="no-such-program") as refused:
        sandbox.run(["no-such-program"])
    assert refused.value.code == "program_not_found", "the command line ends with 127 by it"
    with sandbox.exec("trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.1; done") as program:
        for event in program:
            if isinstance(event, ProcessOutput):
                program.send_signal("SIGINT")
                break
        assert program.wait().exit_code == 5


def test_a_time_limit_ends_the_whole_group(sandbox: Sandbox) -> None:
    ended = sandbox.run("sleep 4321 & sleep 4321", timeout_seconds=2)
    assert ended.error == "timeout"
    assert "4321" not in sandbox.run("pgrep -af 'sleep 432[1]' || true").stdout


def test_stdout_and_stderr_are_separate_and_complete(sandbox: Sandbox) -> None:
    """50 MB of each kind, told apart and hashed."""
    script = (
        "import sys, os\n"
        "a, b = b'o' * 65536, b'e' * 65536\n"
        "for _ in range(50 * 10**6 // 65536):\n"
        "    sys.stdout.buffer.write(a); sys.stderr.buffer.write(b)\n"
    )
    counts = {"stdout": 0, "stderr": 0}
    wrong = 0
    with sandbox.exec(["python3", "-c", script]) as program:
        for event in program:
            if isinstance(event, ProcessOutput):
                counts[event.stream] += len(event.data)
                wrong += len(event.data) - event.data.count(b"o" if event.stream == "stdout" else b"e")
        assert program.wait().exit_code == 0
    expected = 50 * 10**6 // 65536 * 65536
    assert counts == {"stdout": expected, "stderr": expected}
    assert wrong == 0


def test_stdin(sandbox: Sandbox) -> None:
    assert sandbox.run(["sha256sum"], input=b"x" * MEGABYTE).stdout.split()[0] == (
        hashlib.sha256(b"x" * MEGABYTE).hexdigest()
    )
    assert sandbox.run(["cat"]).stdout == "", "without input a program reads end-of-file at once"
    with sandbox.exec(["cat"], stdin=True) as program:
        program.write_stdin("grüezi".encode())
        program.close_stdin()
        received = b"".join(event.data for event in program if isinstance(event, ProcessOutput))
    assert received.decode() == "grüezi"


def test_terminal_resizes(sandbox: Sandbox) -> None:
    with sandbox.open_terminal(["/bin/sh"], size=TerminalSize(100, 30)) as terminal:
        terminal.send(b"stty size; echo done-$((1+1))\n")
        assert b"30 100" in _read_until(terminal, b"done-2")
        terminal.resize(TerminalSize(120, 40))
        terminal.send(b"stty size; echo again-$((2+2))\n")
        assert b"40 120" in _read_until(terminal, b"again-4")
        terminal.send(b"exit 3\n")
        assert [event.exit_code for event in terminal if isinstance(event, ProcessEnded)] == [3]


def _read_until(terminal: Terminal, mark: bytes) -> bytes:
    seen = b""
    for event in terminal:
        if isinstance(event, ProcessOutput):
            seen += event.data
            if mark in seen:
                return seen
    raise AssertionError(f"the terminal ended before {mark!r}: {seen!r}")


def test_files_of_any_name(sandbox: Sandbox) -> None:
    for name in ("plain", "ä ö 漢字 🎉", "new\nline", b"\xff\xfe binary"):
        path = b"/home/user/names/" + (name if isinstance(name, bytes) else name.encode())
        content = os.urandom(1000)
        sandbox.files.write(path, content)
        assert sandbox.files.read_bytes(path) == content
    assert len(sandbox.files.list("/home/user/names")) == 4
    assert sandbox.run("ls /home/user/names | wc -l").stdout.strip() == "5", "one name has a line break"
    sandbox.files.remove("/home/user/names")
    with pytest.raises(NotFoundError):
        sandbox.files.stat("/home/user/names")


def test_a_large_file_comes_back_the_same(sandbox: Sandbox, tmp_path: Path) -> None:
    original = tmp_path / "original"
    digest = hashlib.sha256()
    with original.open("wb") as file:
        for _ in range(200):
            piece = os.urandom(MEGABYTE)
            digest.update(piece)
            file.write(piece)
    sandbox.files.upload(original, "/home/user/large")
    assert sandbox.run(["sha256sum", "large"]).stdout.split()[0] == digest.hexdigest()
    returned = tmp_path / "returned"
    sandbox.files.download("/home/user/large", returned)
    assert hashlib.sha256(returned.read_bytes()).hexdigest() == digest.hexdigest()
    sandbox.files.remove("/home/user/large")


def test_the_users_rights_hold(sandbox: Sandbox) -> None:
    for path in ("/etc/shadow", "/root/.profile"):
        with pytest.raises(AtelierError):
            sandbox.files.read_bytes(path)
    with pytest.raises(AtelierError):
        sandbox.files.write("/root/owned", b"x")
    assert sandbox.files.read_bytes("/etc/shadow", user="root")


def test_the_agent_comes_back_after_a_kill(sandbox: Sandbox) -> None:
    """``kill -9`` of the guest agent: another one answers, and other processes live on."""
    find_agent = ["pgrep", "-f", "/opt/shared/agent/start"]
    killed = sandbox.run(find_agent).stdout
    assert killed
    with sandbox.exec("echo $$; exec sleep 8765") as program:
        for event in program:
            if isinstance(event, ProcessOutput):
                break
        sandbox.run(f"sudo sh -c 'sleep 0.3; kill -9 {killed.strip()}' >/dev/null 2>&1 &")
    deadline = time.monotonic() + 60
    answering = killed
    while answering in ("", killed):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        with contextlib.suppress(AtelierError):
            answering = sandbox.run(find_agent).stdout
    assert "sleep 8765" in sandbox.run(["pgrep", "-af", "sleep 8765"]).stdout
    sandbox.run("pkill -f 'sleep 876[5]'")


def test_metrics(sandbox: Sandbox) -> None:
    metrics = sandbox.metrics()
    assert metrics.cpu_count == 1
    assert 300 * 2**20 < metrics.memory_total_bytes < 600 * 2**20
    assert metrics.disk_total_bytes > 3 * 2**30
