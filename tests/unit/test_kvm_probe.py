"""The KVM probe against stand-ins for QEMU: one that hangs, one that dies, one whose guest answers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atelier.drivers.vmm import kvm_probe
from atelier.drivers.vmm.kvm_probe import KvmAnswer, boot_tiny_guest, find_node_obstacle, kvm_group_ids, probe_kvm
from atelier.drivers.vmm.vmm_users import UserRange
from atelier.host.processes import find_processes
from atelier.model.machine import BootFiles

ANSWERS = """
console = next(a for a in sys.argv if a.startswith("file,id=console")).rpartition("/")[2]
fd = next(a for a in sys.argv if a.endswith(f",set={console}")).split(",")[0].removeprefix("fd=")
assert "atelier.probe" in sys.argv[sys.argv.index("-append") + 1].split()
os.write(int(fd), b"some words\\r\\nATELIER-PROBE-OK\\r\\n")
"""


@pytest.fixture
def boot(tmp_path: Path) -> BootFiles:
    file = tmp_path / "file"
    file.write_bytes(b"")
    return BootFiles(file, file, file, "", "")


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    def make(body: str) -> Path:
        program = tmp_path / "stand-in-qemu"
        program.write_text(f"#!{sys.executable}\nimport os, sys, time\n{body}\n")
        program.chmod(0o755)
        return program

    yield make
    assert find_processes(Path(sys.executable).resolve().name, [str(tmp_path / "stand-in-qemu")]) == []


async def test_a_guest_that_answers(boot: BootFiles, stand_in: Callable[[str], Path]) -> None:
    assert (await boot_tiny_guest(stand_in(ANSWERS), boot, None)).usable


async def test_a_guest_that_hangs(
    boot: BootFiles, stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm_probe, "_TIME_LIMIT_SECONDS", 0.5)
    answer = await boot_tiny_guest(stand_in("time.sleep(1000)"), boot, None)
    assert not answer.usable
    assert "did not come up within 0.5 s" in answer.reason


async def test_a_qemu_that_dies(boot: BootFiles, stand_in: Callable[[str], Path]) -> None:
    answer = await boot_tiny_guest(stand_in("print('failed to set MSR', file=sys.stderr)"), boot, None)
    assert not answer.usable
    assert "failed to set MSR" in answer.reason


async def test_a_program_that_is_not_there(boot: BootFiles, tmp_path: Path) -> None:
    answer = await boot_tiny_guest(tmp_path / "absent", boot, None)
    assert not answer.usable
    assert "absent" in answer.reason


async def test_the_answer_is_kept_until_something_changes(
    boot: BootFiles, stand_in: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "kvm"
    node.touch(0o600)
    monkeypatch.setattr(kvm_probe, "_KVM_NODE", node)
    cache = tmp_path / "cache" / "kvm.json"
    good, bad = stand_in(ANSWERS), tmp_path / "absent"
    assert (await probe_kvm(good, "version 1", boot, cache, None)).usable
    assert (await probe_kvm(bad, "version 1", boot, cache, None)).usable, "it was kept"
    assert not (await probe_kvm(bad, "version 2", boot, cache, None)).usable
    kept = json.loads(cache.read_bytes())
    kept["key"]["boot_id"] = "another boot"
    cache.write_text(json.dumps(kept))
    assert (await probe_kvm(good, "version 2", boot, cache, None)).usable
    for spoilt in ("", "[]", '{"key": 1}'):
        cache.write_text(spoilt)
        assert (await probe_kvm(good, "version 2", boot, cache, None)).usable
    # Where the node is gone, nothing that was kept counts.
    node.unlink()
    assert not (await probe_kvm(good, "version 2", boot, cache, None)).usable


def test_the_node_must_be_there_and_open_to_the_vmm(tmp_path: Path) -> None:
    node = tmp_path / "kvm"
    absent = find_node_obstacle(node, None)
    assert absent is not None
    assert str(node) in absent.reason
    node.touch()
    node.chmod(0o600)
    users = UserRange(1, 1)
    closed = find_node_obstacle(node, users)
    assert closed is not None
    assert closed.hint
    node.chmod(0o666)
    assert find_node_obstacle(node, users) is None
    assert kvm_group_ids(node) == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to a group needs root")
def test_a_group_that_may_open_the_node_is_lent_to_the_vmm(tmp_path: Path) -> None:
    node = tmp_path / "kvm"
    node.touch()
    node.chmod(0o660)
    os.chown(node, 0, 54321)
    assert kvm_group_ids(node) == (54321,)
    os.chown(node, 0, 0)
    assert kvm_group_ids(node) is None


def test_an_answer_is_a_plain_value() -> None:
    assert KvmAnswer(True, "x") == KvmAnswer(usable=True, reason="x", hint="")
