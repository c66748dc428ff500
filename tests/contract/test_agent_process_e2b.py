"""E2B's own in-VM client drives the guest agent's processes and terminals.

Where E2B's behaviour is documented or visible in its client, it is followed; the last tests are about where it is not.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from agent_fixture import RunningAgent
from e2b import PtySize
from e2b.exceptions import (
    AuthenticationException,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    TimeoutException,
)
from e2b.sandbox.commands.command_handle import CommandExitException

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may act for other users")


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends between the opening and the reading
        return False
    return state != "Z"


# What a program writes and how it ends.


def test_a_command_gives_both_outputs_apart(agent: RunningAgent) -> None:
    result = agent.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code, result.error) == ("out\n", "err\n", 0, None)


def test_an_exit_code_is_reported(agent: RunningAgent) -> None:
    with pytest.raises(CommandExitException) as caught:
        agent.commands.run("echo before; exit 7")
    assert caught.value.exit_code == 7
    assert caught.value.stdout == "before\n"
    assert caught.value.error == "exit status 7"


def test_death_by_signal_is_reported_as_e2b_does(agent: RunningAgent) -> None:
    with pytest.raises(CommandExitException) as caught:
        agent.commands.run("kill -9 $$")
    assert caught.value.exit_code == -1
    assert caught.value.error == "signal: killed"


def test_fifty_megabytes_come_complete_and_apart(agent: RunningAgent) -> None:
    program = (
        "import sys\n"
        "for i in range(800):\n"
        "    sys.stdout.write(f'{i:07d}' * 4681); sys.stderr.write(f'{i:07x}' * 4681)\n"
    )
    digests = {"stdout": hashlib.sha256(), "stderr": hashlib.sha256()}
    result = agent.commands.run(
        f'python3 -c "{program}"',
        on_stdout=lambda text: digests["stdout"].update(text.encode()),
        on_stderr=lambda text: digests["stderr"].update(text.encode()),
        retain_output=False,
    )
    assert result.exit_code == 0
    for name, form in (("stdout", "{:07d}"), ("stderr", "{:07x}")):
        wanted = hashlib.sha256()
        for index in range(800):
            wanted.update((form.format(index) * 4681).encode())
        assert digests[name].hexdigest() == wanted.hexdigest(), name


def test_the_end_never_overtakes_output(agent: RunningAgent) -> None:
    for _ in range(20):
        result = agent.commands.run("head -c 100000 /dev/zero | tr '\\0' x; echo done >&2")
        assert len(result.stdout) == 100_000
        assert result.stderr == "done\n"


def test_a_child_left_behind_holds_nothing_up_and_lives_on(agent: RunningAgent, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    result = agent.commands.run(f"(sleep 1; echo late; echo more; touch {mark}) & echo $!")
    assert is_alive(int(result.stdout))
    wait_until(mark.exists)


def test_unicode_and_odd_bytes_pass_as_arguments(agent: RunningAgent) -> None:
    assert agent.commands.run("printf '%s' 'grüße 🙂'").stdout == "grüße 🙂"
    assert agent.commands.run("printf '\\377\\376'").stdout == "\ufffd\ufffd"


# Environment, folder, user.


def test_the_environment_is_a_login_one_with_what_was_asked_for(agent: RunningAgent) -> None:
    result = agent.commands.run("echo $HOME:$USER:$LOGNAME:$EXTRA; pwd", envs={"EXTRA": "a b=c"})
    assert result.stdout.splitlines() == ["/root:root:root:a b=c", "/root"]


def test_the_working_directory_is_honoured(agent: RunningAgent, tmp_path: Path) -> None:
    assert agent.commands.run("pwd -P", cwd=str(tmp_path)).stdout.strip() == str(tmp_path.resolve())


def test_a_working_directory_that_is_not_there_is_an_invalid_argument(agent: RunningAgent) -> None:
    with pytest.raises(InvalidArgumentException, match="/no/such/folder"):
        agent.commands.run("true", cwd="/no/such/folder")


@needs_root
def test_another_user_is_taken_on_wholly(agent: RunningAgent) -> None:
    result = agent.commands.run("id -u; id -g; id -G; grep -E '^(Uid|Gid|CapEff)' /proc/self/status", user="nobody")
    uid, gid, _, *lines = result.stdout.splitlines()
    assert uid == "65534"
    assert lines == [
        f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}",
        f"Gid:\t{gid}\t{gid}\t{gid}\t{gid}",
        "CapEff:\t0000000000000000",
    ]
    assert agent.commands.run("id -u").stdout == "0\n", "the agent is itself again"


@needs_root
def test_a_folder_closed_to_the_user_is_refused(agent: RunningAgent, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(SandboxException, match="closed to the user"):
        agent.commands.run("true", user="nobody", cwd=str(tmp_path))


def test_an_unknown_user_is_an_authentication_error(agent: RunningAgent) -> None:
    with pytest.raises(AuthenticationException):
        agent.commands.run("true", user="nobody-of-that-name")


# Input.


def test_stdin_is_sent_and_closed(agent: RunningAgent) -> None:
    handle = agent.commands.run("cat; echo end", background=True, stdin=True)
    agent.commands.send_stdin(handle.pid, "one\n")
    handle.send_stdin("two\n")
    handle.close_stdin()
    assert handle.wait().stdout == "one\ntwo\nend\n"


def test_without_stdin_a_program_reads_the_end_of_file(agent: RunningAgent) -> None:
    assert agent.commands.run("cat; echo end", timeout=20).stdout == "end\n"


def test_much_input_waits_for_a_slow_reader(agent: RunningAgent) -> None:
    handle = agent.commands.run("sleep 0.5; sha256sum", background=True, stdin=True)
    data = os.urandom(1_000_000).hex().encode()
    handle.send_stdin(data)
    handle.close_stdin()
    assert handle.wait().stdout.split()[0] == hashlib.sha256(data).hexdigest()


def test_input_is_streamed(agent: RunningAgent) -> None:
    handle = agent.commands.run("wc -c", background=True, stdin=True)
    agent.commands.stream_input(handle.pid, (b"x" * 10_000 for _ in range(50)))
    handle.close_stdin()
    assert handle.wait().stdout.strip() == "500000"


def test_input_for_a_program_that_has_closed_it_is_an_error(agent: RunningAgent) -> None:
    handle = agent.commands.run("exec <&-; echo closed; sleep 60", background=True, stdin=True)
    for stdout, _, _ in handle:
        assert stdout == "closed\n"
        break
    with pytest.raises(SandboxException, match="takes no more input"):
        agent.commands.send_stdin(handle.pid, "x")
    assert agent.commands.kill(handle.pid)


# List, connect, signals, time limits.


def test_a_running_command_is_listed_until_it_ends(agent: RunningAgent) -> None:
    handle = agent.commands.run("sleep 60", background=True, envs={"A": "b"}, cwd="/tmp")
    entry = next(process for process in agent.commands.list() if process.pid == handle.pid)
    assert (entry.cmd, entry.args) == ("/bin/bash", ["-l", "-c", "sleep 60"])
    assert (entry.envs, entry.cwd, entry.tag) == ({"A": "b"}, "/tmp", None)
    assert handle.kill()
    wait_until(lambda: all(process.pid != handle.pid for process in agent.commands.list()))
    assert not agent.commands.kill(handle.pid)


def test_killing_reaches_the_children(agent: RunningAgent) -> None:
    handle = agent.commands.run("sleep 300 & echo $!; wait", background=True)
    child = 0
    for stdout, _, _ in handle:
        child = int(stdout or 0)
        break
    assert is_alive(child)
    assert handle.kill()
    wait_until(lambda: not is_alive(child))


def test_the_time_limit_ends_the_stream_and_the_whole_group(agent: RunningAgent, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    # On a busy machine the shell may not come to its words within the first of them.
    for limit_seconds in (1, 5, 25):
        with pytest.raises(TimeoutException):
            agent.commands.run(f"sleep 300 & echo $! > {pid_file}; wait", timeout=limit_seconds)
        if pid_file.exists() and pid_file.read_text().endswith("\n"):
            break
    wait_until(lambda: pid_file.exists() and not is_alive(int(pid_file.read_text())))


def test_a_client_that_leaves_ends_nothing_and_may_come_back(agent: RunningAgent) -> None:
    handle = agent.commands.run("echo first; read line; echo got $line", background=True, stdin=True)
    for stdout, _, _ in handle:
        assert stdout == "first\n"
        break
    handle.disconnect()
    again = agent.commands.connect(handle.pid)
    agent.commands.send_stdin(handle.pid, "it\n")
    assert again.wait().stdout == "first\ngot it\n", "what was kept is replayed, then the rest follows"


def test_what_ended_with_nobody_attached_can_still_be_read(agent: RunningAgent) -> None:
    handle = agent.commands.run("sleep 0.7; echo result; exit 3", background=True)
    handle.disconnect()
    wait_until(lambda: all(process.pid != handle.pid for process in agent.commands.list()))
    with pytest.raises(CommandExitException) as caught:
        agent.commands.connect(handle.pid).wait()
    assert (caught.value.stdout, caught.value.exit_code) == ("result\n", 3)

    def is_forgotten() -> bool:
        try:
            agent.commands.connect(handle.pid)
        except NotFoundException:
            return True
        return False

    wait_until(is_forgotten)


def test_two_readers_get_the_same(agent: RunningAgent) -> None:
    handle = agent.commands.run("read line; seq 20000", background=True, stdin=True)
    second = agent.commands.connect(handle.pid)
    results: list[str] = []
    reader = threading.Thread(target=lambda: results.append(second.wait().stdout))
    reader.start()
    handle.send_stdin("\n")
    first = handle.wait().stdout
    reader.join(30)
    assert results == [first]
    assert first.splitlines()[-1] == "20000"


def test_connecting_to_nothing_is_not_found(agent: RunningAgent) -> None:
    with pytest.raises(NotFoundException):
        agent.commands.connect(4_000_000)


def test_without_a_reader_the_program_goes_on_and_the_newest_output_is_kept(
    agent: RunningAgent, tmp_path: Path
) -> None:
    mark = tmp_path / "done"
    handle = agent.commands.run(f"sleep 0.5; seq 500000; touch {mark}; read line", background=True, stdin=True)
    handle.disconnect()
    wait_until(mark.exists)
    again = agent.commands.connect(handle.pid)
    handle_input = agent.commands
    handle_input.send_stdin(handle.pid, "\n")
    lines = again.wait().stdout.splitlines()
    assert lines[-1] == "500000"
    assert 500_000 < sum(len(line) + 1 for line in lines) <= 1024 * 1024


def test_a_reader_that_does_not_read_holds_the_program_back(agent: RunningAgent, tmp_path: Path) -> None:
    mark = tmp_path / "done"
    handle = agent.commands.run(f"head -c 100000000 /dev/zero; touch {mark}", background=True)
    time.sleep(1.5)
    assert not mark.exists()
    handle.disconnect()
    wait_until(mark.exists)


# Terminals.


def read_terminal(handle, until: bytes, seconds: float = 20.0) -> bytes:
    """What comes until ``until`` is seen."""
    seen = b""
    for _, _, piece in handle:
        seen += piece or b""
        if until in seen:
            return seen
    raise AssertionError(f"{until!r} did not come, but {seen!r}")


def test_a_terminal_has_a_size_and_can_be_resized(agent: RunningAgent) -> None:
    handle = agent.pty.create(PtySize(rows=31, cols=97), timeout=60)
    agent.pty.send_stdin(handle.pid, b"stty size; echo $TERM; tty >/dev/tty\n")
    seen = read_terminal(handle, b"/dev/pts/")
    assert b"31 97" in seen
    assert b"xterm-256color" in seen
    again = agent.pty.connect(handle.pid)
    agent.pty.resize(handle.pid, PtySize(rows=50, cols=140))
    agent.pty.send_stdin(handle.pid, b"stty size\n")
    assert b"31 97" in read_terminal(again, b"50 140"), "the scrollback comes first"
    assert agent.pty.kill(handle.pid)


def test_a_terminal_ends_with_its_exit_code(agent: RunningAgent) -> None:
    handle = agent.pty.create(PtySize(rows=24, cols=80), timeout=60)
    agent.pty.stream_input(handle.pid, [b"exit", b" 5\n"])
    with pytest.raises(CommandExitException) as caught:
        handle.wait()
    assert caught.value.exit_code == 5


def test_killing_a_terminal_ends_its_foreground_job(agent: RunningAgent) -> None:
    handle = agent.pty.create(PtySize(rows=24, cols=80), timeout=60)
    agent.pty.send_stdin(handle.pid, b"bash -c 'echo job=$$=; exec sleep 300'\n")
    job = b""
    while not job.isdigit():
        job = read_terminal(handle, b"=\r\n").rpartition(b"job=")[2].partition(b"=")[0]
    assert agent.pty.kill(handle.pid)
    wait_until(lambda: not is_alive(int(job)))


@needs_root
def test_a_terminal_belongs_to_its_user(agent: RunningAgent) -> None:
    handle = agent.pty.create(PtySize(rows=24, cols=80), user="nobody", cwd="/tmp", timeout=60)
    agent.pty.send_stdin(handle.pid, b"stat -c owner=%U $(tty)\n")
    read_terminal(handle, b"owner=nobody")
    assert agent.pty.kill(handle.pid)


def test_the_agent_is_well_after_all_this(agent: RunningAgent) -> None:
    wait_until(lambda: not agent.commands.list())
    descriptors = list(Path(f"/proc/{agent.process.pid}/fd").iterdir())
    assert len(descriptors) < 60, "descriptors leak"
    agent.process.send_signal(signal.SIGCONT)
    assert agent.commands.run("echo well").stdout == "well\n"
