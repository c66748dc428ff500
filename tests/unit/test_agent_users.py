"""Users, groups and paths as the guest agent sees them."""

from __future__ import annotations

import os
from base64 import b64encode
from pathlib import Path

import pytest

from atelier.guest_agent.http import Request
from atelier.guest_agent.state import AgentState
from atelier.guest_agent.users import UserDirectory, basic_user, resolve_path
from atelier.guest_protocol.connect import ConnectError

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
user:x:1000:1000:A User,,,:/home/user:/bin/zsh
bare:x:1001:1001:::
broken line
odd:x:notanumber:1:::
root:x:5:5:a second root:/elsewhere:/bin/false
"""
GROUP = """\
root:x:0:
sudo:x:27:user,other
user:x:1000:user
docker:x:999:user
odd:x:nan:user
"""


@pytest.fixture
def users(tmp_path: Path) -> UserDirectory:
    (tmp_path / "passwd").write_text(PASSWD)
    (tmp_path / "group").write_text(GROUP)
    return UserDirectory(str(tmp_path / "passwd"), str(tmp_path / "group"))


def test_a_user_has_home_shell_and_groups(users: UserDirectory) -> None:
    user = users.get("user")
    assert (user.uid, user.gid, user.home, user.shell) == (1000, 1000, "/home/user", "/bin/zsh")
    assert user.groups == (1000, 27, 999)
    assert users.get("root").uid == 0
    assert users.get("bare")[3:] == ("/", "/bin/sh", (1001,))
    assert users.find("odd") is None
    with pytest.raises(ConnectError) as caught:
        users.get("nobody-here")
    assert caught.value.code == "unauthenticated"


def test_names_of_numbers(users: UserDirectory) -> None:
    assert [users.name_of(uid) for uid in (0, 1000, 4242)] == ["root", "user", "4242"]
    assert [users.group_name_of(gid) for gid in (27, 4242)] == ["sudo", "4242"]


def test_a_change_of_the_files_is_seen(users: UserDirectory, tmp_path: Path) -> None:
    assert users.find("new") is None
    (tmp_path / "passwd").write_text(PASSWD + "new:x:7:7::/new:/bin/sh\n")
    assert users.get("new").uid == 7
    (tmp_path / "passwd").unlink()
    assert users.find("new") is None


def test_the_basic_user() -> None:
    assert basic_user(None) is None
    assert basic_user("Bearer x") is None
    assert basic_user("Basic " + b64encode(b"ann:").decode()) == "ann"
    assert basic_user("basic " + b64encode(b":").decode()) is None
    for bad in ("Basic !", "Basic " + b64encode(b"\xff:").decode()):
        with pytest.raises(ConnectError):
            basic_user(bad)


def test_paths_are_resolved_from_the_home(users: UserDirectory) -> None:
    user = users.get("user")
    for path, wanted in {
        b"": b"/home/user",
        b"a/../b": b"/home/user/b",
        b"~": b"/home/user",
        b"~/x": b"/home/user/x",
        b"/etc//passwd": b"/etc/passwd",
        b"//etc": b"/etc",
        b"../../../..": b"/",
        b"\xff": b"/home/user/\xff",
    }.items():
        assert resolve_path(path, user) == wanted
    assert resolve_path("ü", user) == "/home/user/ü".encode()
    assert resolve_path("x", user, "~/work") == b"/home/user/work/x"
    for bad in (b"a\0b", b"~root/x"):
        with pytest.raises(ConnectError):
            resolve_path(bad, user)


def request(**headers: str) -> Request:
    return Request("GET", "/", "", headers, None, 0)  # type: ignore[arg-type]


def test_the_acting_user_is_the_named_the_basic_or_the_default_one(users: UserDirectory, tmp_path: Path) -> None:
    state = AgentState(users=users)
    basic = "Basic " + b64encode(b"bare:").decode()
    assert state.user_of(request()).name == "user"
    assert state.user_of(request(authorization=basic)).name == "bare"
    assert state.user_of(request(authorization=basic), "root").name == "root"
    (tmp_path / "passwd").write_text(PASSWD.replace("user:x", "somebody:x"))
    assert state.user_of(request()).name == "root", "an image without the usual user"
    state.default_user = "gone"
    with pytest.raises(ConnectError):
        state.user_of(request())


def test_the_token(users: UserDirectory) -> None:
    state = AgentState(users=users)
    assert state.is_token("anything")
    state.set_token("s3cret-ü")
    assert state.is_token("s3cret-ü")
    for wrong in ("", "s3cret", "s3cret-ü ", "\udcff"):
        assert not state.is_token(wrong)


def test_this_machine_has_root() -> None:
    root = UserDirectory().get("root")
    assert (root.uid, root.gid) == (0, 0)
    assert os.path.isabs(root.home)
