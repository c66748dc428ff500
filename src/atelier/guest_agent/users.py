"""Who a request acts as: users and groups from /etc/passwd and /etc/group, and paths relative to a user's home.

Used by the process and filesystem services. The files are read directly, without NSS: the guest agent's Python has a
C library of its own, whose NSS modules need not fit the image. Never changes the agent's own identity.
"""

from __future__ import annotations

import os
from binascii import Error as BinasciiError
from binascii import a2b_base64
from typing import Final, NamedTuple

from atelier.guest_protocol.connect import ConnectError

PASSWD_PATH: Final = "/etc/passwd"
GROUP_PATH: Final = "/etc/group"

_Stamp = tuple[int, int, int]


class User(NamedTuple):
    """A line of /etc/passwd with the user's groups (primary one included, each once)."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str
    groups: tuple[int, ...]


class UserDirectory:
    """The users and groups of the guest; a file is parsed again only when it has changed."""

    def __init__(self, passwd_path: str = PASSWD_PATH, group_path: str = GROUP_PATH) -> None:
        self._passwd_path = passwd_path
        self._group_path = group_path
        self._stamps: tuple[_Stamp, _Stamp] | None = None
        self._by_name: dict[str, User] = {}
        self._names: dict[int, str] = {}
        self._group_names: dict[int, str] = {}

    def find(self, name: str) -> User | None:
        self._refresh()
        return self._by_name.get(name)

    def get(self, name: str) -> User:
        """Raises ConnectError ``unauthenticated`` (as E2B does) when there is no such user."""
        user = self.find(name)
        if user is None:
            raise ConnectError("unauthenticated", f"no such user in this sandbox: {name[:64]!r}")
        return user

    def name_of(self, uid: int) -> str:
        """The user's name, or its number as text if it has none."""
        self._refresh()
        return self._names.get(uid) or str(uid)

    def group_name_of(self, gid: int) -> str:
        self._refresh()
        return self._group_names.get(gid) or str(gid)

    def _refresh(self) -> None:
        stamps = (_stamp(self._passwd_path), _stamp(self._group_path))
        if stamps == self._stamps:
            return
        memberships: dict[str, list[int]] = {}
        group_names: dict[int, str] = {}
        for name, gid_text, members in _fields(self._group_path, (0, 2, 3)):
            if not gid_text.isdecimal():
                continue
            gid = int(gid_text)
            group_names.setdefault(gid, name)
            for member in members.split(","):
                if member:
                    memberships.setdefault(member, []).append(gid)
        by_name: dict[str, User] = {}
        names: dict[int, str] = {}
        for name, uid_text, gid_text, home, shell in _fields(self._passwd_path, (0, 2, 3, 5, 6)):
            if not (uid_text.isdecimal() and gid_text.isdecimal()):
                continue
            uid, gid = int(uid_text), int(gid_text)
            groups = tuple(dict.fromkeys([gid, *memberships.get(name, ())]))
            by_name.setdefault(name, User(name, uid, gid, home or "/", shell or "/bin/sh", groups))
            names.setdefault(uid, name)
        self._by_name, self._names, self._group_names, self._stamps = by_name, names, group_names, stamps


def _stamp(path: str) -> _Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def _fields(path: str, wanted: tuple[int, ...]) -> list[tuple[str, ...]]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            rows = [line.rstrip("\n").split(":") for line in lines]
    except OSError:
        return []
    return [tuple(row[index] for index in wanted) for row in rows if len(row) > wanted[-1] and row[0]]


def basic_user(authorization: str | None) -> str | None:
    """The user's name in a Basic ``Authorization`` header, None if there is none. Raises ConnectError."""
    if authorization is None:
        return None
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name = a2b_base64(encoded, strict_mode=True).decode().partition(":")[0]
    except (BinasciiError, ValueError):
        raise ConnectError("unauthenticated", "the Authorization header is no valid Basic one") from None
    return name or None


def resolve_path(path: bytes | str, user: User, default_directory: str = "") -> bytes:
    """``path`` made absolute and normalised without following links: ``~`` and ``~/x`` from the user's home, a
    relative or empty one from ``default_directory`` (itself resolved so), else from the home.

    Raises ConnectError ``invalid_argument`` for a path with a NUL byte or another user's ``~name``.
    """
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ConnectError("invalid_argument", "a path cannot hold a NUL byte")
    home = os.fsencode(user.home)
    if raw == b"~" or raw.startswith(b"~/"):
        raw = home + raw[1:]
    elif raw.startswith(b"~"):
        raise ConnectError("invalid_argument", "only ~ itself stands for a home folder, not ~name")
    elif not raw.startswith(b"/"):
        start = resolve_path(default_directory, user) if default_directory else home
        raw = start + b"/" + raw
    return b"/" + os.path.normpath(raw).lstrip(b"/")
