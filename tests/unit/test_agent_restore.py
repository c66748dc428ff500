"""What a restored guest is told, piece by piece, on this host: hooks, generation file, host key, clock, and the gate that
holds back what could write meanwhile."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from atelier.guest_agent import clock, identity, quiesce, restore_hooks, tools_disk
from atelier.guest_agent.direct_reader import BodyIntake, DirectReader
from atelier.guest_agent.freezer import Freezer
from atelier.guest_agent.gate import Gate
from atelier.guest_agent.quiesce import Quiesce
from atelier.guest_protocol.connect import ConnectError
from atelier.lifecycle.ssh_host_key import make_ssh_host_key

ENVIRONMENT = {"PATH": os.environ["PATH"], "ATELIER_GENERATION": "g1"}


def hook(folder: Path, name: str, script: str, mode: int = 0o755) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)


async def failure_of(folder: Path) -> str:
    with pytest.raises(ConnectError) as caught:
        await restore_hooks.run_hooks(ENVIRONMENT, str(folder))
    assert caught.value.code == "aborted"
    return caught.value.message


# Hooks.


async def test_hooks_run_in_the_order_of_their_names_and_are_told_the_generation(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    hooks = tmp_path / "hooks"
    await restore_hooks.run_hooks(ENVIRONMENT, str(hooks))
    hooks.mkdir()
    for name in ("20-b", "10-a", "30-c"):
        hook(hooks, name, f'echo "{name} $ATELIER_GENERATION $(cat)" >>{ran}')
    hook(hooks, "00-off", f"echo off >>{ran}", 0o644)
    hook(hooks, ".hidden", f"echo hidden >>{ran}")
    (hooks / "40-folder").mkdir()
    await restore_hooks.run_hooks(ENVIRONMENT, str(hooks))
    assert ran.read_text().splitlines() == ["10-a g1 ", "20-b g1 ", "30-c g1 "]


async def test_the_first_failure_is_told_with_the_end_of_what_it_said(tmp_path: Path) -> None:
    hook(tmp_path, "10-a", "head -c 300000 /dev/zero | tr '\\0' x; echo; echo the end >&2; exit 7")
    hook(tmp_path, "20-b", f"touch {tmp_path}/ran")
    message = await failure_of(tmp_path)
    assert "10-a ended with exit status 7: xxx" in message
    assert message.endswith("x\nthe end")
    assert len(message) < 2300
    assert not (tmp_path / "ran").exists()


async def test_one_that_cannot_be_started(tmp_path: Path) -> None:
    hook(tmp_path, "10-a", "")
    (tmp_path / "10-a").write_text("#!/nonexistent/interpreter\n")
    assert "10-a cannot be run: No such file" in await failure_of(tmp_path)


async def test_one_that_does_not_end_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_hooks, "LIMIT_SECONDS", 1.0)
    hook(tmp_path, "10-a", f"sleep 1000 & echo $! >{tmp_path}/child; echo waiting; wait")
    message = await failure_of(tmp_path)
    assert "10-a did not end: all hooks have 1 s: waiting" in message
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    async with asyncio.timeout(20):
        while child.exists() and "(sleep) Z" not in (child / "stat").read_text():
            await asyncio.sleep(0.02)


async def test_what_a_hook_leaves_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    hook(tmp_path, "10-a", f"sleep 1000 & echo $! >{tmp_path}/child")
    async with asyncio.timeout(20):
        await restore_hooks.run_hooks(ENVIRONMENT, str(tmp_path))
    os.kill(int((tmp_path / "child").read_text()), 9)


def test_the_generation_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "generation"
    monkeypatch.setattr(restore_hooks, "GENERATION_PATH", str(path))
    restore_hooks.write_generation("one")
    with path.open() as held:
        restore_hooks.write_generation("two")
        assert (held.read(), path.read_text()) == ("one\n", "two\n")


# Who it is.


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    ssh = tmp_path / "ssh"
    ssh.mkdir()
    monkeypatch.setattr(identity, "MACHINE_ID_PATH", str(tmp_path / "machine-id"))
    monkeypatch.setattr(identity, "SSH_FOLDER", str(ssh))
    monkeypatch.setattr(identity, "_HOST_KEY", str(ssh / "ssh_host_ed25519_key"))
    return tmp_path


def a_key() -> identity.HostKey:
    made = make_ssh_host_key()
    return identity.HostKey({"privateKey": made.private_key, "publicKey": made.public_key})


def test_the_host_s_keys_are_in_openssh_s_form() -> None:
    one, other = make_ssh_host_key(), make_ssh_host_key()
    assert one.private_key != other.private_key and one.public_key != other.public_key
    assert one.public_key.startswith("ssh-ed25519 ")
    assert one.private_key not in repr(one)
    identity.HostKey({"privateKey": one.private_key, "publicKey": one.public_key})


def test_a_key_is_taken_by_who_has_none_or_was_somebody_else(system: Path) -> None:
    key_file = system / "ssh" / "ssh_host_ed25519_key"
    first, second, third = a_key(), a_key(), a_key()
    identity.become("0" * 32, first)
    assert key_file.read_text() == first.private
    identity.become("0" * 32, second)
    assert key_file.read_text() == first.private, "people know it by its key"
    for kind in ("rsa", "ecdsa"):
        (system / "ssh" / f"ssh_host_{kind}_key").write_text("old")
        (system / "ssh" / f"ssh_host_{kind}_key.pub").write_text("old")
    identity.become("1" * 32, third)
    assert (system / "machine-id").read_text() == "1" * 32 + "\n"
    assert sorted(path.name for path in (system / "ssh").iterdir()) == [key_file.name, f"{key_file.name}.pub"]
    assert (key_file.read_text(), key_file.stat().st_mode & 0o777) == (third.private, 0o600)
    assert key_file.with_name(f"{key_file.name}.pub").read_text() == third.public


def test_a_guest_that_is_cut_off_takes_its_key_at_the_next_try(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity.become("0" * 32, a_key())

    def cut_off(path: str, content: str) -> None:
        raise OSError(5, "as told")

    with monkeypatch.context() as patch:
        patch.setattr(identity, "_write_if_changed", cut_off)
        with pytest.raises(ConnectError):
            identity.become("1" * 32, a_key())
    last = a_key()
    identity.become("1" * 32, last)
    assert (system / "ssh" / "ssh_host_ed25519_key").read_text() == last.private


def test_an_image_without_ssh_gets_no_folder_for_it(system: Path) -> None:
    (system / "ssh").rmdir()
    identity.become("0" * 32, a_key())
    assert not (system / "ssh").exists()


@pytest.mark.parametrize(
    ("ahead_seconds", "given_seconds", "stepped_seconds"),
    [(-3600.0, 0.0, 3600.0), (-0.01, 0.0, 0.01), (0.3, 0.3, None), (3600.0, 3600.0, None)],
)
def test_a_restored_clock_is_stepped_forward_only(
    monkeypatch: pytest.MonkeyPatch, ahead_seconds: float, given_seconds: float, stepped_seconds: float | None
) -> None:
    given: list[int] = []
    stepped: list[int] = []
    monkeypatch.setattr(clock, "correct", given.append)
    monkeypatch.setattr(clock, "_step", stepped.append)
    clock.catch_up(time.time_ns() - round(ahead_seconds * 1e9))
    assert given == [pytest.approx(given_seconds * 1e9, abs=5e9 if given_seconds else 0)]
    expected = [] if stepped_seconds is None else [pytest.approx(stepped_seconds * 1e9, abs=5e9)]
    assert stepped == expected


def test_no_tools_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools_disk, "_BLOCK_DEVICES", str(tmp_path))
    with pytest.raises(ConnectError, match="no disk with the serial atelier-tools"):
        tools_disk.ensure_mounted()


# Standing still.


class StandIn(Freezer):
    """A freezer that notes what it is asked for; ``obstacle`` is raised, or waited for."""

    def __init__(self) -> None:
        super().__init__("/nonexistent")
        self.done: list[str] = []
        self.obstacle: OSError | None = None
        self.hangs = False

    async def freeze(self, groups: list[str]) -> None:
        groups.append("/atelier")
        self.done.append("freeze")
        if self.obstacle is not None:
            raise self.obstacle
        if self.hangs:
            await asyncio.Event().wait()

    def unfreeze(self, groups: list[str]) -> None:
        self.done.append(f"unfreeze {groups}")


@pytest.fixture
def freezer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """And no root file system is touched: what is asked of it is noted, too."""
    stand_in = StandIn()
    monkeypatch.setattr(quiesce, "MARK_PATH", str(tmp_path / "run" / "quiesced"))
    monkeypatch.setattr(quiesce, "_freeze_root", lambda: stand_in.done.append("freeze /"))
    monkeypatch.setattr(quiesce, "thaw_root", lambda: stand_in.done.append("thaw /"))
    return stand_in


async def test_the_order_of_standing_still_and_going_on(freezer: StandIn, tmp_path: Path) -> None:
    gate = Gate()
    one = Quiesce(gate, touches_system=True, freezer=freezer)
    await one.end()
    assert freezer.done == []
    await one.begin()
    assert not gate.is_open
    assert (tmp_path / "run" / "quiesced").read_text() == "/atelier\n"
    # An agent that was started anew knows what to let go.
    await Quiesce(gate, touches_system=True, freezer=freezer).end()
    assert gate.is_open
    assert freezer.done == ["freeze", "freeze /", "thaw /", "unfreeze ['/atelier']"]
    assert not (tmp_path / "run" / "quiesced").exists()


@pytest.mark.parametrize("hangs", [False, True])
async def test_what_fails_leaves_nothing_standing_still(
    freezer: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr(quiesce, "LIMIT_SECONDS", 0.5)
    freezer.hangs = hangs
    freezer.obstacle = None if hangs else OSError(2, "cgroup v2 is not mounted")
    gate = Gate()
    with pytest.raises(ConnectError) as caught:
        await Quiesce(gate, touches_system=True, freezer=freezer).begin()
    assert caught.value.code == "aborted"
    assert ("did not stand still within 0.5 s" if hangs else "cgroup v2 is not mounted") in caught.value.message
    assert gate.is_open
    assert freezer.done == ["freeze", "thaw /", "unfreeze ['/atelier']"]
    assert not (tmp_path / "run" / "quiesced").exists()


async def test_a_guest_without_control_groups_says_so_and_goes_on(freezer: StandIn, tmp_path: Path) -> None:
    gate = Gate()
    with pytest.raises(ConnectError, match="cgroup v2 is not mounted") as caught:
        await Quiesce(gate, touches_system=True, freezer=Freezer(str(tmp_path))).begin()
    assert caught.value.code == "aborted"
    assert gate.is_open and freezer.done == ["thaw /"]


async def test_a_disk_that_stands_still_too_late_is_let_go(freezer: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiesce, "LIMIT_SECONDS", 0.5)

    def slow() -> None:
        time.sleep(1.5)
        freezer.done.append("freeze / at last")

    monkeypatch.setattr(quiesce, "_freeze_root", slow)
    with pytest.raises(ConnectError, match="did not stand still"):
        await Quiesce(Gate(), touches_system=True, freezer=freezer).begin()
    async with asyncio.timeout(20):
        while freezer.done[-2:] != ["freeze / at last", "thaw /"]:
            await asyncio.sleep(0.02)


async def test_a_body_that_is_poured_stops_at_the_gate_and_goes_on_behind_it() -> None:
    gate, reader, taken = Gate(), DirectReader(), bytearray()
    intake = BodyIntake(taken.extend, 9)
    pouring = asyncio.create_task(reader.pour(intake, gate))
    await asyncio.sleep(0)
    reader.feed_data(b"abc")
    gate.close()
    reader.feed_data(b"def")
    await asyncio.sleep(0.01)
    reader.feed_data(b"ghiNEXT")
    assert taken == b"abc"
    gate.open()
    await pouring
    assert taken == b"abcdefghi"
    assert await reader.read(4) == b"NEXT"
    assert gate.on_close == set()


async def test_a_body_that_breaks_off_at_the_gate() -> None:
    gate, reader, taken = Gate(), DirectReader(), bytearray()
    pouring = asyncio.create_task(reader.pour(BodyIntake(taken.extend, 9), gate))
    await asyncio.sleep(0)
    gate.close()
    reader.feed_eof()
    await asyncio.sleep(0.01)
    assert not pouring.done()
    gate.open()
    with pytest.raises(ConnectionResetError):
        await pouring
