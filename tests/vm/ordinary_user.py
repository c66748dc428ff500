"""Runs a piece of a test as an ordinary user although the tests run as root: in a forked child that gives root up.

The interpreter and the checkout may lie where that user cannot look, so the child is a fork, not a new program.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any

ORDINARY_USER = 54321
"""Nobody's: it needs no passwd entry."""


def as_ordinary_user(act: Callable[[], Any]) -> Any:
    """What ``act`` returns, by way of JSON; an exception in the child fails the test with its traceback.

    Under an ordinary user already: just called.
    """
    if os.geteuid() != 0:
        return act()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(ORDINARY_USER)
            os.setuid(ORDINARY_USER)
            answer = {"returned": act()}
        except BaseException:
            answer = {"raised": traceback.format_exc()}
        with os.fdopen(write_end, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = json.load(pipe)
    os.waitpid(pid, 0)
    assert "raised" not in answer, answer["raised"]
    return answer["returned"]
