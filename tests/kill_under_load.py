"""Many clients create and destroy sandboxes at once, manager and gateway are killed in the middle, and the next start
is held against what was acknowledged. Used by the tests of both modes and by the figure ``leaks_after_kill``."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
from tests.footprint import gateway_pid, vmm_pids
from tests.leftovers import traces_of
from tests.running_manager import LocalInstallation, wait_until

SMALL = {"memory_mib": 128}
"""Enough to boot, and many have room at once."""
_APART_SECONDS = 0.04
_SCRIPT = "cat /home/user/mine"


@dataclass
class Promises:
    """What the manager has acknowledged: ``created`` by name, ``destroyed`` as ids. ``unsure``: ids whose destruction
    was asked for without an answer."""

    created: dict[str, str] = field(default_factory=dict)
    destroyed: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)
    answers: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def note(self, change: Callable[[], object]) -> None:
        with self.changed:
            change()
            self.answers += 1
            self.changed.notify_all()

    def settle(self, present: Container[str]) -> None:
        """Of what was destroyed nothing is to be looked for again; what was unsure has been decided."""
        gone = self.destroyed
        self.created = {name: each for name, each in self.created.items() if each not in gone and name in present}
        self.destroyed, self.unsure = set(), set()

    @property
    def owed(self) -> dict[str, str]:
        """Sandboxes that must be there, by name."""
        gone = self.destroyed | self.unsure
        return {name: sandbox_id for name, sandbox_id in self.created.items() if sandbox_id not in gone}


@dataclass
class Witness:
    """A sandbox that runs all the time, with a file in it."""

    name: str
    sandbox_id: str
    pids: list[int]

    @classmethod
    def create(cls, installation: LocalInstallation, name: str) -> Witness:
        row = installation.create(name)
        if installation.mode == "local":
            installation.run(name, f"echo {name} >/home/user/mine")
        return cls(name, row["id"], vmm_pids(row["id"]))

    def check(self, installation: LocalInstallation) -> None:
        row = installation.wait_settled(self.name)
        assert (row["state"], row["id"]) == ("running", self.sandbox_id), row
        if installation.mode == "local":
            assert installation.run(self.name, _SCRIPT) == f"{self.name}\n"
            assert vmm_pids(self.sandbox_id) == self.pids, "its machine went on"


@dataclass(frozen=True)
class Moment:
    """When to kill: after so many answers to a load, and seconds."""

    answers: int
    then_seconds: float = 0.0


def kill_in_the_middle(
    installation: LocalInstallation,
    promises: Promises,
    names: Sequence[str],
    victims: Sequence[str],
    moment: Moment,
) -> None:
    """All ``names`` are created and all ``victims`` (ids) destroyed at once, each by a client of its own, which destroys
    every second new one again. At the ``moment`` manager and gateway are killed."""
    manager = installation.manager
    gateway = gateway_pid(manager) if installation.mode == "local" else None
    promises.answers = 0
    together = threading.Barrier(len(names) + len(victims))

    def create(number: int, name: str) -> None:
        with manager.client() as client:
            together.wait()
            answer = client.post("/api/v1/sandboxes", json={"name": name, **SMALL})
            assert answer.status_code == 202, answer.text
            sandbox_id = answer.json()["id"]
            promises.note(lambda: promises.created.update({name: sandbox_id}))
            if number % 2:
                # Each finds its creation a little further on.
                time.sleep(number * _APART_SECONDS)
                destroy_now(client, sandbox_id)

    def destroy(sandbox_id: str) -> None:
        with manager.client() as client:
            together.wait()
            destroy_now(client, sandbox_id)

    def destroy_now(client: httpx.Client, sandbox_id: str) -> None:
        with promises.changed:
            promises.unsure.add(sandbox_id)
        answer = client.delete(f"/api/v1/sandboxes/{sandbox_id}")
        assert answer.status_code in (202, 404), answer.text
        promises.note(lambda: promises.destroyed.add(sandbox_id))

    with ThreadPoolExecutor(len(names) + len(victims)) as pool:
        works = [pool.submit(create, number, name) for number, name in enumerate(names)]
        works += [pool.submit(destroy, victim) for victim in victims]
        with promises.changed:
            promises.changed.wait_for(lambda: promises.answers >= moment.answers, timeout=60)
        time.sleep(moment.then_seconds)
        if gateway is not None:
            os.kill(gateway, signal.SIGKILL)
        installation.kill()
    for work in works:
        error = work.exception()
        assert error is None or isinstance(error, httpx.TransportError), error


def kill_again_and_again(
    installation: LocalInstallation,
    witnesses: Sequence[Witness],
    victims: Sequence[str],
    creates: int,
    moments: Sequence[Moment],
) -> None:
    """A load, a kill, the next manager and what it owes, for each of ``moments``; then all sandboxes are destroyed.
    ``victims`` are destroyed under the first load, what is left of each load under the next."""
    promises = Promises()
    for number, moment in enumerate(moments):
        names = [f"load-{number}-{each}" for each in range(creates)]
        kill_in_the_middle(installation, promises, names, victims, moment)
        installation.start()
        for witness in witnesses:
            witness.check(installation)
        check_promises(installation, promises)
        victims = list(promises.owed.values())
    assert promises.owed, "else the last kill came too late to show anything"
    destroy_all(installation)


def create_witnesses(installation: LocalInstallation, count: int) -> list[Witness]:
    with ThreadPoolExecutor(8) as pool:
        names = [f"witness-{number}" for number in range(count)]
        return list(pool.map(lambda name: Witness.create(installation, name), names))


def check_promises(installation: LocalInstallation, promises: Promises) -> None:
    """With a new manager: what was created has its row, what was to be destroyed goes without a trace."""
    rows = list_ids(installation)
    assert promises.owed.items() <= rows.items(), "each acknowledged creation has its row"
    for sandbox_id in promises.destroyed:
        wait_until(lambda each=sandbox_id: each not in list_ids(installation).values())
        found = traces_of(installation.folder, sandbox_id)
        assert not found, found
    promises.settle(rows)


def list_ids(installation: LocalInstallation) -> dict[str, str]:
    """By name."""
    rows = installation.call("GET", "/sandboxes?limit=500")["items"]
    return {row["name"]: row["id"] for row in rows}


def destroy_all(installation: LocalInstallation) -> None:
    with ThreadPoolExecutor(16) as pool:
        paths = [f"/sandboxes/{each}?wait=true" for each in list_ids(installation).values()]
        list(pool.map(lambda path: installation.call("DELETE", path, expected=204), paths))
