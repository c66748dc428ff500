"""Detached processes: started as nobody's child, named by identity, ended with proof."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from atelier.host import processes
from atelier.host.processes import ProcessUser, ResourceLimits
from atelier.model.errors import CommandError, HostError, MissingProgramError


def _open_files(pid: int) -> set[int]:
    return {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.fixture
async def log(tmp_path: Path) -> Path:
    return tmp_path / "stderr.log"


async def test_a_detached_process_is_nobodys_child_and_carries_nothing_else(log: Path) -> None:
    read_end, write_end = os.pipe()
    # An inheritable descriptor that is not passed must not arrive.
    os.set_inheritable(read_end, True)
    identity = await processes.start_detached(
        ["sleep", "1000"],
        stderr_path=log,
        limits=ResourceLimits(open_files=77, file_size_bytes=123456),
        pass_descriptors=[write_end],
    )
    try:
        assert processes.find_identity(identity.pid) == identity
        status = _status(identity.pid)
        assert status["PPid"] != str(os.getpid())
        assert status["NoNewPrivs"] == "1"
        assert os.getsid(identity.pid) == identity.pid
        # While it is being loaded it has its libraries open, too.
        deadline = time.monotonic() + 30
        while (open_files := _open_files(identity.pid)) != {0, 1, 2, write_end}:
            assert time.monotonic() < deadline, open_files
            time.sleep(0.02)
        limits = Path(f"/proc/{identity.pid}/limits").read_text()
        assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")] == [
            ["77", "77"]
        ]
        assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max file size")] == ["123456"]
        environment = Path(f"/proc/{identity.pid}/environ").read_bytes().split(b"\0")
        assert {entry.partition(b"=")[0] for entry in environment} <= {b"PATH", b"LANG", b"PWD", b"OLDPWD", b"_", b""}
        assert log.stat().st_mode & 0o777 == 0o600
    finally:
        await processes.kill_and_wait(identity)
        os.close(read_end)
        os.close(write_end)
    assert processes.find_identity(identity.pid) != identity
    await processes.kill_and_wait(identity)
    await processes.wait_ended(identity)


async def test_processes_are_found_by_executable_and_arguments(log: Path) -> None:
    identity = await processes.start_detached(["sleep", "1000", "0.125"], stderr_path=log)
    try:
        assert processes.find_processes("sleep", ["1000", "0.125"]) == [identity]
        assert processes.find_processes("sleep", ["000", "0.125"]) == []
        assert processes.find_processes("cat", ["1000", "0.125"]) == []
    finally:
        await processes.kill_and_wait(identity)
    assert processes.find_processes("sleep", ["1000", "0.125"]) == []


async def test_a_process_is_proved_by_executable_and_arguments_too(log: Path) -> None:
    identity = await processes.start_detached(["sleep", "4242"], stderr_path=log)
    try:
        assert processes.runs(identity, "sleep", ["4242"])
        assert not processes.runs(identity, "sleep", ["424"])
        assert not processes.runs(identity, "sleep", ["4242", "4242"])
        assert not processes.runs(identity, "slee", ["4242"])
        assert not processes.runs(replace(identity, start_time_ticks=1), "sleep", ["4242"])
        assert not processes.runs(replace(identity, boot_id="another"), "sleep", ["4242"])
    finally:
        await processes.kill_and_wait(identity)
    assert not processes.runs(identity, "sleep", ["4242"])


@pytest.mark.parametrize("starter_died", [False, True])
async def test_a_process_that_is_about_to_become_the_program_is_waited_for(starter_died: bool) -> None:
    """Whoever looks right after the death of a starter must not overlook what that had begun to start."""
    read_end, write_end = os.pipe()
    # Full, so that the shell cannot tell its pid yet.
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 4096)
    os.set_blocking(write_end, True)
    program = [str(shutil.which("sleep")), "1000", "0.375"]
    starting = subprocess.Popen(
        ["sh", "-c", processes._ANNOUNCE_AND_EXEC, "sh", *program], stdin=subprocess.DEVNULL, stdout=write_end
    )
    os.close(write_end)
    try:
        looking = asyncio.create_task(asyncio.to_thread(processes.find_processes, "sleep", program[1:]))
        await asyncio.sleep(0.2)
        assert not looking.done()
        if starter_died:
            os.close(read_end)
            assert await looking == []
            assert starting.wait(60) == -signal.SIGPIPE, "it has not become the program"
        else:
            while os.read(read_end, 1 << 20)[-1:] == b"x":
                pass
            assert [identity.pid for identity in await looking] == [starting.pid]
            os.close(read_end)
    finally:
        starting.kill()
        starting.wait()


async def test_values_of_an_argument_are_listed(log: Path) -> None:
    """Of this program only, after this option only, with this prefix only."""
    shell = Path(shutil.which("sh") or "").resolve().name
    script = 'echo "$$" >&2; while :; do sleep 1000; done'
    started = [
        await processes.start_detached(["sh", "-c", script, *words], stderr_path=log)
        for words in (
            ["-name", "listed-one-aaa"],
            ["x", "-name", "listed-one-bbb", "-name", "y"],
            ["-name", "listed-two-ccc"],
            ["-other", "listed-one-ddd"],
        )
    ]
    try:
        assert sorted(processes.list_argument_values(shell, "-name", "listed-one-")) == ["aaa", "bbb"]
        assert processes.list_argument_values("qemu", "-name", "listed-one-") == []
    finally:
        for identity in started:
            for child in Path(f"/proc/{identity.pid}/task/{identity.pid}/children").read_text().split():
                os.kill(int(child), 9)
            await processes.kill_and_wait(identity)
    assert processes.list_argument_values(shell, "-name", "listed-one-") == []


async def test_memory_is_that_of_this_process_while_it_lives(log: Path) -> None:
    identity = await processes.start_detached(
        ["python3", "-c", "import time; held = b'x' * 50_000_000; time.sleep(1000)"], stderr_path=log
    )
    try:
        async with asyncio.timeout(30):
            while processes.resident_bytes(identity) < 50_000_000:
                await asyncio.sleep(0.02)
        assert processes.resident_bytes(identity) < 100_000_000
        assert processes.resident_bytes(replace(identity, start_time_ticks=identity.start_time_ticks + 1)) == 0
    finally:
        await processes.kill_and_wait(identity)
    assert processes.resident_bytes(identity) == 0


async def test_wait_ended_returns_when_the_process_dies(log: Path) -> None:
    identity = await processes.start_detached(["sleep", "1000"], stderr_path=log)
    waiting = asyncio.create_task(processes.wait_ended(identity))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await processes.kill_and_wait(identity)
    async with asyncio.timeout(10):
        await waiting


async def test_another_process_with_the_same_pid_is_left_alone() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    try:
        real = processes.find_identity(child.pid)
        assert real is not None
        for other in (
            replace(real, start_time_ticks=real.start_time_ticks - 1),
            replace(real, boot_id="11111111-2222-3333-4444-555555555555"),
        ):
            assert not processes.is_alive(other)
            await processes.kill_and_wait(other)
            await processes.wait_ended(other)
            assert child.poll() is None
    finally:
        child.kill()
        # Dead, but not yet reaped: that counts as gone.
        async with asyncio.timeout(10):
            while processes.find_identity(child.pid) is not None:
                await asyncio.sleep(0.01)
        child.wait()


async def test_a_missing_program_is_named(log: Path) -> None:
    with pytest.raises(MissingProgramError, match="no-such-program is not installed"):
        await processes.start_detached(["no-such-program"], stderr_path=log)


async def test_a_chain_that_breaks_says_why(log: Path) -> None:
    broken = ["sleep", "1000"]
    user = ProcessUser(2**32 - 2, 2**32 - 2) if os.geteuid() != 0 else None
    limits = ResourceLimits(open_files=10**12) if os.geteuid() == 0 else ResourceLimits()
    with pytest.raises(CommandError, match=r"prlimit|setpriv"):
        await processes.start_detached(broken, stderr_path=log, user=user, limits=limits)


async def test_a_cancelled_start_leaves_no_process(log: Path) -> None:
    starting = asyncio.create_task(processes.start_detached(["sleep", "1000", "0.0625"], stderr_path=log))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert processes.find_processes("sleep", ["1000", "0.0625"]) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
async def test_another_users_process(log: Path, tmp_path: Path) -> None:
    identity = await processes.start_detached(
        ["sleep", "1000"], stderr_path=log, user=ProcessUser(54321, 54322, (54323,))
    )
    try:
        status = _status(identity.pid)
        assert status["Uid"].split() == ["54321"] * 4
        assert status["Gid"].split() == ["54322"] * 4
        assert status["Groups"].split() == ["54323"]
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        refusal = _in_child_as(12345, lambda: asyncio.run(processes.kill_and_wait(identity)))
        assert refusal == "HostError process_not_ours"
        assert processes.is_alive(identity)
    finally:
        await processes.kill_and_wait(identity)


def _in_child_as(user_id: int, act) -> str:
    """The class and code of the error that ``act`` raises in a child of that user."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        words = "nothing raised"
        with contextlib.suppress(BaseException):
            os.setuid(user_id)
            try:
                act()
            except HostError as error:
                words = f"{type(error).__name__} {error.code}"
        os.write(write_end, words.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        words = pipe.read()
    os.waitpid(pid, 0)
    return words


def test_under_uvloop_too(tmp_path: Path) -> None:
    async def start_and_end() -> set[int]:
        identity = await processes.start_detached(["sleep", "1000"], stderr_path=tmp_path / "stderr.log")
        descriptors = {int(entry.name) for entry in Path(f"/proc/{identity.pid}/fd").iterdir()}
        waiting = asyncio.create_task(processes.wait_ended(identity))
        await asyncio.sleep(0.05)
        await processes.kill_and_wait(identity)
        async with asyncio.timeout(10):
            await waiting
        return descriptors

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(start_and_end()) == {0, 1, 2}
