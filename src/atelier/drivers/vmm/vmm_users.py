"""Which user a VMM runs as: each live one a user id of its own, so that one broken out of reaches no other.

Called by the VMM drivers; Firecracker's jails hold their ids by themselves. For QEMU an id is claimed by binding an abstract unix socket named after it, and the VMM inherits
that socket: the kernel frees the claim when the VMM ends, and no file can go stale. The ids need no passwd entry.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from atelier.host.processes import ProcessUser
from atelier.model.errors import CapacityError


@dataclass(frozen=True, slots=True)
class UserRange:
    """User ids ``first`` to ``first + count - 1``, used as group ids too."""

    first: int
    count: int


VMM_USERS = UserRange(1_900_000_000, 65_536)
"""What a host has that is not within a small user namespace."""

_CANDIDATE_RANGES = (VMM_USERS, UserRange(60_706, 478))
"""Ranges that neither distributions nor systemd assign; the second for a root whose user namespace is small.
Source: systemd docs/UIDS-GIDS.md."""


@dataclass(frozen=True, slots=True)
class ClaimedUser:
    """``claim_descriptor`` is to be inherited by the VMM."""

    user_id: int
    claim_descriptor: int

    def process_user(self, supplementary_group_ids: tuple[int, ...] = ()) -> ProcessUser:
        return ProcessUser(self.user_id, self.user_id, supplementary_group_ids)


def find_user_range() -> UserRange | None:
    """The ids that this process may give its VMMs; None when it is not root (or root over too few ids)."""
    if os.geteuid() != 0:
        return None
    users, groups = (_mapped(Path("/proc/self") / name) for name in ("uid_map", "gid_map"))
    for candidate in _CANDIDATE_RANGES:
        if _covered(candidate, users) and _covered(candidate, groups):
            return candidate
    return None


@contextmanager
def claim_user(users: UserRange, sandbox_id: str) -> Generator[ClaimedUser]:
    """A user id that no live VMM of this host has. The claim outlives the block in whoever inherited its descriptor.

    Raises CapacityError when all are taken.
    """
    for user_id in user_candidates(users, sandbox_id):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claim:
            try:
                claim.bind(f"\0atelier-vmm-user-{user_id}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            yield ClaimedUser(user_id, claim.fileno())
            return
    raise all_users_taken(users)


def user_candidates(users: UserRange, sandbox_id: str) -> Iterator[int]:
    """All of the range, in an order of this sandbox's own."""
    start = int.from_bytes(hashlib.sha256(b"uid " + sandbox_id.encode()).digest()[:8], "big")
    for offset in range(users.count):
        yield users.first + (start + offset) % users.count


def all_users_taken(users: UserRange) -> CapacityError:
    return CapacityError(
        f"all {users.count} user ids for virtual machines are taken", hint="remove sandboxes, then try again"
    )


def _mapped(map_file: Path) -> list[tuple[int, int]]:
    """(first id, count) of what this user namespace knows. Source: user_namespaces(7)."""
    lines = (line.split() for line in map_file.read_text().splitlines())
    return [(int(first), int(count)) for first, _, count in lines]


def _covered(users: UserRange, mapped: list[tuple[int, int]]) -> bool:
    return any(first <= users.first and users.first + users.count <= first + count for first, count in mapped)
