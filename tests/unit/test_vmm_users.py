"""User ids of VMMs: no two live ones share one, and the kernel gives a claim back by itself."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack

import pytest

from atelier.drivers.vmm.vmm_users import UserRange, claim_user, find_user_range
from atelier.model.errors import CapacityError

# Not the range of real machines, which may run beside this test.
RANGE = UserRange(1_800_000_000 + os.getpid() % 1000 * 100, 3)
SANDBOX = "aaaaaaaaaaaa"


def test_claims_differ_until_all_are_taken() -> None:
    with ExitStack() as stack:
        claimed = {stack.enter_context(claim_user(RANGE, SANDBOX)).user_id for _ in range(3)}
        assert claimed == {RANGE.first, RANGE.first + 1, RANGE.first + 2}
        with pytest.raises(CapacityError), claim_user(RANGE, SANDBOX):
            pass
    with claim_user(RANGE, SANDBOX) as again:
        assert again.user_id in claimed


def test_whoever_inherits_a_claim_keeps_it() -> None:
    with claim_user(RANGE, SANDBOX) as claim:
        first = claim.user_id
        heir = subprocess.Popen(["sleep", "1000"], pass_fds=[claim.claim_descriptor])
    try:
        with claim_user(RANGE, SANDBOX) as second:
            assert second.user_id != first
    finally:
        heir.kill()
        heir.wait()
    with claim_user(RANGE, SANDBOX) as third:
        assert third.user_id == first


def test_only_root_gives_user_ids_away() -> None:
    users = find_user_range()
    if os.geteuid() != 0:
        assert users is None
    elif users is not None:
        assert users.first > 60_000
        assert users.count >= 400
