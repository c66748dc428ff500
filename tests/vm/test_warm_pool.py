"""A real guest waits in a warm pool, warmed, and is given away as though it had been made just now."""

from __future__ import annotations

import pytest
from tests.real_machines import NO_QEMU
from tests.running_manager import running_local_manager, wait_until

from atelier import Sandbox, WarmPool

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

MEMORY_MIB = 192
WAIT_SECONDS = 900.0
WHAT_IS_THERE = """
cd / && { find home root tmp var/tmp -mindepth 1 | sort; ps -eo uid,args --no-headers | grep -v '\\[' | grep -vE 'ps -eo|grep|sh -c'; }
"""


def test_nothing_of_the_warming_shows_in_what_is_given_away() -> None:
    with running_local_manager() as manager:

        def create(name: str) -> Sandbox:
            return Sandbox.create(
                name=name,
                memory_mib=MEMORY_MIB,
                environment={"OWN": name},
                api_url=manager.url,
                api_key=manager.key,
                timeout_seconds=WAIT_SECONDS,
            )

        def is_ready() -> bool:
            (pool,) = WarmPool.list(api_url=manager.url, api_key=manager.key)
            return pool.ready == 1

        with create("booted") as booted:
            WarmPool.set("base", 1, memory_mib=MEMORY_MIB, api_url=manager.url, api_key=manager.key)
            wait_until(is_ready, WAIT_SECONDS)
            with create("taken") as taken:
                assert taken.run("hostname; cat /etc/hostname; echo $OWN", check=True).stdout.split() == ["taken"] * 3
                assert "127.0.1.1\ttaken\n" in taken.run("cat /etc/hosts", check=True).stdout
                present, expected = (
                    each.run(WHAT_IS_THERE, user="root", check=True).stdout for each in (taken, booted)
                )
                assert present == expected
                who = "cat /etc/machine-id /run/atelier/generation /etc/ssh/ssh_host_ed25519_key.pub"
                assert not set(taken.run(who).stdout.split()[:2]) & set(booted.run(who).stdout.split()[:2])
            WarmPool.drain("base", api_url=manager.url, api_key=manager.key)
