"""A release of Firecracker: taken only when it is what it should be, whole, and of a version and machine that fit."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from tests.unit.host_setup.fake_machine import FakeMachine

from atelier.config.host import Download
from atelier.host_setup import firecracker_release
from atelier.host_setup.changes import Look, LookState, UndoOptions
from atelier.host_setup.firecracker_release import FirecrackerChange, undo_firecracker
from atelier.host_setup.journal import Record

SCRIPT = "#!/bin/sh\necho 'Firecracker v{version}'\n"


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    (tmp_path / "root").mkdir()
    return FakeMachine(tmp_path / "root")


def _release(path: Path, version: str = "1.12.0", *, programs: tuple[str, ...] = ("firecracker", "jailer")) -> str:
    """Its checksum. As the vendor packs it: a folder, versions in the names, symbols beside the programs."""
    with tarfile.open(path, "w:gz") as archive:
        for program in programs:
            for name in (f"{program}-v{version}-x86_64", f"{program}-v{version}-x86_64.debug"):
                content = SCRIPT.format(version=version).encode() if not name.endswith(".debug") else b"symbols"
                member = tarfile.TarInfo(f"release-v{version}-x86_64/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def scripts_are_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of these releases are scripts; what they say of their version counts all the same."""
    monkeypatch.setattr("atelier.drivers.vmm.firecracker_version._check_architecture", lambda executable: None)


def _look(machine: FakeMachine, change: FirecrackerChange, own: Record | None = None) -> Look:
    return asyncio.run(change.look(machine, own))


def test_a_release_is_installed_once_and_goes_again(machine: FakeMachine) -> None:
    sha256 = _release(machine.path("/release.tgz"))
    change = FirecrackerChange(Download("/release.tgz", sha256))
    assert _look(machine, change) == Look(LookState.MISSING, "install Firecracker 1.12.0")
    notes: list[Record] = []
    asyncio.run(change.apply(machine, None, notes.append))
    for name in ("firecracker", "jailer"):
        installed = machine.path(f"/usr/local/lib/atelier/{name}")
        assert installed.stat().st_mode & 0o777 == 0o755
        assert "v1.12.0" in installed.read_text()
    assert _look(machine, change, notes[-1]).state is LookState.THERE
    sha256 = _release(machine.path("/release.tgz"), "1.13.1")
    newer = FirecrackerChange(Download("/release.tgz", sha256))
    assert _look(machine, newer, notes[-1]) == Look(LookState.MISSING, "install Firecracker 1.13.1")
    assert asyncio.run(undo_firecracker(machine, notes[-1], UndoOptions())) == ""
    assert list(machine.path("/usr/local/lib/atelier").iterdir()) == []


def test_a_folder_with_both_programs_will_do(machine: FakeMachine) -> None:
    folder = machine.path("/built")
    folder.mkdir()
    for name in ("firecracker", "jailer"):
        (folder / name).write_text(SCRIPT.format(version="1.14.0"))
    assert _look(machine, FirecrackerChange(Download("/built", ""))).words == "install Firecracker 1.14.0"
    (folder / "jailer").unlink()
    refused = _look(machine, FirecrackerChange(Download("/built", "")))
    assert refused.words == "/built is no release of Firecracker: there is no jailer in it"


@pytest.mark.parametrize(
    ("version", "programs", "sha256", "words"),
    [
        ("1.12.0", ("firecracker", "jailer"), "0" * 64, "is not what it should be"),
        ("1.12.0", ("firecracker",), "", "there is no jailer in it"),
        ("1.11.0", ("firecracker", "jailer"), "", "1.11.0"),
        ("nonsense", ("firecracker", "jailer"), "", "Firecracker"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_changed(
    machine: FakeMachine, version: str, programs: tuple[str, ...], sha256: str, words: str
) -> None:
    _release(machine.path("/release.tgz"), version, programs=programs)
    look = _look(machine, FirecrackerChange(Download("/release.tgz", sha256)))
    assert look.state is LookState.FOREIGN
    assert words in look.words
    assert look.remedy
    assert not machine.path("/usr/local/lib/atelier").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08\x00cut off"])
def test_what_is_no_archive(machine: FakeMachine, content: bytes) -> None:
    machine.path("/release.tgz").write_bytes(content)
    assert "no release of Firecracker" in _look(machine, FirecrackerChange(Download("/release.tgz", ""))).words


def test_one_that_is_not_there(machine: FakeMachine) -> None:
    assert "cannot be read" in _look(machine, FirecrackerChange(Download("/none.tgz", ""))).words


def test_a_firecracker_of_the_hosts_own_is_not_replaced(machine: FakeMachine) -> None:
    sha256 = _release(machine.path("/release.tgz"))
    own = machine.path("/usr/local/lib/atelier/firecracker")
    own.parent.mkdir(parents=True)
    own.write_text("theirs")
    look = _look(machine, FirecrackerChange(Download("/release.tgz", sha256)))
    assert "not of Atelier's making" in look.words
    assert own.read_text() == "theirs"


def test_one_from_afar_is_checked_by_its_checksum(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = _release(machine.path("/release.tgz"))
    content = machine.path("/release.tgz").read_bytes()
    monkeypatch.setattr(firecracker_release, "_fetch", lambda url: content)
    change = FirecrackerChange(Download("https://example.org/f.tgz", sha256))
    notes: list[Record] = []
    assert _look(machine, change).state is LookState.MISSING
    asyncio.run(change.apply(machine, None, notes.append))
    assert _look(machine, change, notes[-1]).state is LookState.THERE
    content += b"\0"
    with pytest.raises(firecracker_release.HostError, match="is not what it should be") as refused:
        asyncio.run(change.apply(machine, notes[-1], notes.append))
    assert refused.value.code == "release_checksum"
