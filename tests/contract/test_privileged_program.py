"""``atelier-privileged``: what it reads, what it refuses, and for whom it does nothing. Nothing here reaches LVM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from atelier.host import command
from atelier.host.lvm import ThinPool
from atelier.host_setup.root_settings import RootSettings, read_root_settings, root_settings_text
from atelier.host_setup.storage_verbs import StorageVerbs
from atelier.host_setup.vmm_verbs import is_own_volume
from atelier.model.errors import AtelierError, HostError

SETTINGS = RootSettings("root", "aaaa", "vg", "pool")
SANDBOX, SNAPSHOT, BASE = "bbbbbbbbbbbb", "ssssssssssss", "0123456789abcdef"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="it is root's program")

_MAIN = """
import sys
from pathlib import Path
from atelier.host_setup.privileged import main
sys.exit(main(sys.argv[2:], Path(sys.argv[1]), Path(sys.argv[1]).parent / "locks"))
"""
# As LVM's programs do, it first closes what it inherits and does not know.
_LVS = """#!/bin/sh
exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
echo lvs >>{folder}/called
while [ -e {folder}/wait ]; do sleep 0.02; done
cat {folder}/report
"""


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "privileged.json"
    path.write_bytes(root_settings_text(SETTINGS))
    path.chmod(0o644)
    return path


def start(settings_file: Path, *words: str, path: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN, str(settings_file), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}"},
    )


def converse(settings_file: Path, lines: Sequence[bytes], *, path: str = "") -> list[dict[str, Any]]:
    helper = start(settings_file, "storage", path=path)
    assert helper.stdin is not None and helper.stdout is not None
    answers = [json.loads(helper.stdout.readline())]
    for line in lines:
        helper.stdin.write(line + b"\n")
        helper.stdin.flush()
        answers.append(json.loads(helper.stdout.readline()))
    helper.stdin.close()
    assert helper.wait() == 0
    return answers


@pytest.fixture
def lvm(tmp_path: Path) -> Iterator[Path]:
    """A folder with an ``lvs`` that knows one pool and nothing in it, and says when it was called."""
    folder = tmp_path / "lvm"
    folder.mkdir()
    pool = dict.fromkeys(("lv_tags", "origin", "pool_lv", "lv_profile"), "")
    pool |= {"lv_name": "pool", "lv_size": "1000", "lv_attr": "twi-aotz--", "vg_free": "0"}
    pool |= {"data_percent": "10.00", "metadata_percent": "5.00"}
    (folder / "report").write_text(json.dumps({"report": [{"lv": [pool]}]}))
    (folder / "lvs").write_text(_LVS.format(folder=folder))
    (folder / "lvs").chmod(0o755)
    yield folder
    # One that is left over ends.
    (folder / "wait").unlink(missing_ok=True)


@as_root
def test_it_answers_line_by_line_and_says_whose_installation_it_serves(settings_file: Path, lvm: Path) -> None:
    hello, told, refused, again = converse(
        settings_file, [b'{"verb": "look"}', b'{"verb": "rm -rf"}', b'{"verb": "look"}'], path=str(lvm)
    )
    assert hello == {"protocol": 1, "installation_id": "aaaa"}
    assert told == again
    assert told["volumes"] == []
    assert refused["error"]["code"] == "privilege_refused"


@as_root
@pytest.mark.parametrize(
    "line", [b"", b"[]", b"null", b"{", b'{"verb": 1}', b"[" * 10000, b"\xff\xfe", b'{"verb": null}']
)
def test_nonsense_is_refused_and_ends_nothing(settings_file: Path, lvm: Path, line: bytes) -> None:
    _, refused, told = converse(settings_file, [line, b'{"verb": "look"}'], path=str(lvm))
    assert refused["error"]["code"] == "privilege_refused"
    assert "pool" in told


@as_root
@pytest.mark.parametrize("words", [[], ["storage", "vmm"], ["disks"], ["--help"], ["storage "]])
def test_any_other_arguments_are_refused(settings_file: Path, words: list[str]) -> None:
    helper = start(settings_file, *words)
    _, said = helper.communicate()
    assert helper.returncode == 2
    assert b"usage" in said


@as_root
@pytest.mark.parametrize("harm", ["writable", "anothers", "link", "absent", "damaged", "no installation"])
def test_settings_that_are_not_roots_own_are_not_believed(settings_file: Path, harm: str) -> None:
    match harm:
        case "writable":
            settings_file.chmod(0o666)
        case "anothers":
            os.chown(settings_file, 12345, 0)
        case "link":
            settings_file.rename(settings_file.with_name("real"))
            settings_file.symlink_to("real")
        case "absent":
            settings_file.unlink()
        case "damaged":
            settings_file.write_text("{")
        case _:
            settings_file.write_text('{"user": "root", "installation_id": "../x"}')
    with pytest.raises(HostError) as refusal:
        read_root_settings(settings_file)
    assert refusal.value.code.startswith("root_settings_")
    assert refusal.value.hint
    helper = start(settings_file, "storage")
    out, said = helper.communicate()
    assert helper.returncode == 1
    assert out == b"", "not even a greeting"
    assert refusal.value.message.encode() in said


@as_root
def test_nothing_is_done_for_a_manager_that_has_gone(settings_file: Path, lvm: Path) -> None:
    """Its successor has looked meanwhile: what was asked for and not begun must not happen behind its back."""
    (lvm / "wait").touch()
    helper = start(settings_file, "storage", path=str(lvm))
    assert helper.stdin is not None and helper.stdout is not None
    helper.stdout.readline()
    helper.stdin.write(b'{"verb": "look"}\n' * 5)
    helper.stdin.flush()
    while not (lvm / "called").exists():
        time.sleep(0.02)
    helper.stdin.close()
    (lvm / "wait").unlink()
    helper.wait()
    assert (lvm / "called").read_text().count("lvs") == 1, "what was begun is ended, the rest is not begun"


@as_root
@pytest.mark.parametrize("killed", ["the manager", "the helper too"])
def test_two_helpers_of_one_group_take_turns(settings_file: Path, lvm: Path, killed: str) -> None:
    """As the first manager's, that was killed, ends what it had begun; or its last command does, that goes on alone."""
    (lvm / "wait").touch()
    first, second = (start(settings_file, "storage", path=str(lvm)) for _ in range(2))
    for helper in (first, second):
        assert helper.stdin is not None and helper.stdout is not None
        helper.stdout.readline()
    assert first.stdin and second.stdin and second.stdout
    first.stdin.write(b'{"verb": "look"}\n')
    first.stdin.flush()
    while not (lvm / "called").exists():
        time.sleep(0.02)
    if killed == "the helper too":
        first.kill()
        first.wait()
    second.stdin.write(b'{"verb": "look"}\n')
    second.stdin.flush()
    time.sleep(0.3)
    assert (lvm / "called").read_text().count("lvs") == 1
    (lvm / "wait").unlink()
    assert "pool" in json.loads(second.stdout.readline())
    for helper in (first, second):
        helper.send_signal(signal.SIGKILL)
        helper.communicate()


HOSTILE: list[tuple[str, dict[str, object]]] = [
    ("create_volume", {"id": "../../etc", "source_kind": "base", "source_id": BASE, "size_bytes": 1}),
    ("create_volume", {"id": SANDBOX, "source_kind": "volume", "source_id": SANDBOX, "size_bytes": 1}),
    ("create_volume", {"id": SANDBOX, "source_kind": "fresh", "source_id": BASE, "size_bytes": 1}),
    ("create_volume", {"id": SANDBOX, "source_kind": "base", "source_id": "pool", "size_bytes": 1}),
    ("create_volume", {"id": SANDBOX, "source_kind": "base", "source_id": BASE, "size_bytes": -1}),
    ("create_volume", {"id": SANDBOX, "source_kind": "base", "source_id": BASE, "size_bytes": True}),
    ("create_volume", {"id": SANDBOX, "source_kind": "base", "source_id": BASE, "size_bytes": "1; reboot"}),
    ("create_volume", {"id": SANDBOX, "source_kind": "base", "source_id": BASE, "size_bytes": 1 << 60}),
    ("create_volume", {"id": SANDBOX, "source_kind": "base", "source_id": BASE}),
    ("create_volume", {"id": SANDBOX, "source_kind": "base", "source_id": BASE, "size_bytes": 1, "group": "vg0"}),
    ("create_volume", {"id": [SANDBOX], "source_kind": "base", "source_id": BASE, "size_bytes": 1}),
    ("create_base", {"id": SANDBOX, "size_bytes": 1}),
    ("create_base", {"id": f"{BASE} --yes", "size_bytes": 1}),
    ("remove", {"kind": "pool", "id": SANDBOX}),
    ("remove", {"kind": "volume", "id": "-y"}),
    ("remove", {"kind": "volume", "id": "AAAAAAAAAAAA"}),
    ("remove", {"kind": "volume", "id": f"{SANDBOX}\n"}),
    ("remove", {"kind": "volume", "id": f"bbbb-volume-{SANDBOX}"}),
    ("expose", {"kind": "volume", "id": "../sda"}),
    ("expose", {"kind": "volume"}),
    ("grow", {"id": SANDBOX, "size_bytes": 0}),
    ("begin_freezing", {"id": SANDBOX, "snapshot_id": "x"}),
    ("freeze", {"id": "x", "snapshot_id": SNAPSHOT}),
    ("end_freezing", {"id": SANDBOX, "snapshot_id": "@tag", "keep": True}),
    ("set_checksum", {"id": SNAPSHOT, "checksum": "0" * 63}),
    ("set_checksum", {"id": SNAPSHOT, "checksum": "0" * 64 + ",other"}),
    ("finish_import", {"id": SNAPSHOT, "checksum": "x"}),
    ("finish_base", {"id": "a/b"}),
    ("look", {"group": "vg0"}),
]


@pytest.mark.parametrize(("verb", "request_"), HOSTILE)
async def test_a_hostile_request_reaches_no_command(
    verb: str, request_: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a command was run")

    monkeypatch.setattr(command, "run", never)
    monkeypatch.setattr(ThinPool, "look", never)
    with pytest.raises((ValueError, TypeError, KeyError, AtelierError)):
        await StorageVerbs(SETTINGS, tmp_path).verbs[verb](request_)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "granted"),
    [
        ("vg-at--aaaa--volume--bbbbbbbbbbbb", True),
        ("vg-at--aaab--volume--bbbbbbbbbbbb", False),
        ("vg-at--aaaa--base--0123456789abcdef", False),
        ("vg-at--aaaa--disk--ssssssssssss", False),
        ("vg--2-at--aaaa--volume--bbbbbbbbbbbb", False),
        ("other-at--aaaa--volume--bbbbbbbbbbbb", False),
        ("vg-root", False),
        ("vg-pool_tdata", False),
        ("", False),
    ],
)
def test_only_a_sandboxs_own_volume_goes_into_a_jail(name: str, granted: bool, tmp_path: Path) -> None:
    device = os.makedev(254, 7)
    assert not is_own_volume(SETTINGS, device, tmp_path), "no device mapper's"
    (tmp_path / "254:7" / "dm").mkdir(parents=True)
    (tmp_path / "254:7" / "dm" / "name").write_text(f"{name}\n")
    assert is_own_volume(SETTINGS, device, tmp_path) == granted
