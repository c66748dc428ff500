"""A manager of real machines that dies right after each step of creating, stopping and starting a sandbox, and after
each undo of destroying it; and the managers after it, which go on.

Each manager dies one place further than the last. A creation that so many starts have resumed is unwound, so the places
are dealt to a few sandboxes, which serve as the others' witnesses afterwards.
"""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import httpx
import pytest
from tests.disturbed_manager import CRASHED, MODULE
from tests.footprint import vmm_pids
from tests.leftovers import traces_of
from tests.lifecycle.sabotage import Place
from tests.lifecycle.test_every_saga import DOS, UNDOS
from tests.running_manager import LocalInstallation, launch_manager, local_installation

from atelier.lifecycle import sandbox_create, sandbox_start, sandbox_stop
from atelier.saga import executor

RESUMED_MAX = executor._RECOVERIES_MAX


def after_each(places: list[Place], kind: str) -> list[Place]:
    return [place for place in places if place.kind == kind and place.moment == "after"]


CREATING = after_each(DOS, sandbox_create.KIND)
STOPPING = after_each(DOS, sandbox_stop.KIND)
STARTING = after_each(DOS, sandbox_start.KIND)
DESTROYING = after_each(UNDOS, sandbox_create.KIND)[::-1]
CHAINS = [CREATING[begin : begin + RESUMED_MAX] for begin in range(0, len(CREATING), RESUMED_MAX)]


@pytest.fixture(scope="module")
def installation() -> Iterator[LocalInstallation]:
    with local_installation() as made:
        yield made


def crash_along(
    installation: LocalInstallation,
    places: Sequence[Place],
    begin: Callable[[], object],
    look: Callable[[], object] = lambda: None,
) -> None:
    """Managers die at ``places``, one after another: the first has been asked for something by ``begin``, the others
    go on with it by themselves. ``look`` is called after each death. Then one that does not die is started."""
    installation.end()
    installation.start(program=(MODULE, "crash", str(places[0])))
    # It may die before its answer is out.
    with suppress(httpx.TransportError):
        begin()
    wait_for_crash(installation, installation.manager.process)
    look()
    for place in places[1:]:
        program = (MODULE, "crash", str(place))
        _, process = launch_manager(installation.folder, "--on-exit", "keep", mode="local", program=program)
        wait_for_crash(installation, process)
        look()
    installation.start()


def wait_for_crash(installation: LocalInstallation, process: subprocess.Popen[bytes]) -> None:
    try:
        assert process.wait(120) == CRASHED, installation.manager.log.read_text()
    finally:
        # One that did not come there must not hold the folder's lock.
        process.kill()
        process.wait()


def id_of(installation: LocalInstallation, name: str) -> str:
    with sqlite3.connect(installation.folder / "data" / "atelier.db") as database:
        ((sandbox_id,),) = database.execute("SELECT id FROM sandboxes WHERE name = ?", (name,)).fetchall()
    database.close()
    return sandbox_id


def name_of(chain: int) -> str:
    return f"chain-{chain}"


@pytest.mark.parametrize("chain", range(len(CHAINS)))
def test_a_creation_is_resumed_after_a_crash_at_any_step(installation: LocalInstallation, chain: int) -> None:
    name = name_of(chain)
    machines: list[list[int]] = []
    crash_along(
        installation,
        CHAINS[chain],
        lambda: installation.call("POST", "/sandboxes", {"name": name, "memory_mib": 256}, expected=202),
        lambda: machines.append(vmm_pids(id_of(installation, name))),
    )
    row = installation.wait_settled(name)
    assert (row["state"], row["failure"]) == ("running", None)
    check_it_works(installation, name)
    started = [found for found in machines if found]
    assert all(found == vmm_pids(row["id"]) for found in started), "a machine that was started is not started anew"


def check_it_works(installation: LocalInstallation, name: str) -> None:
    row = installation.call("GET", f"/sandboxes/{name}")
    assert installation.run(name, "hostname; df -BM --output=size / | tail -1 | tr -dc 0-9").split()[0] == name
    assert len(vmm_pids(row["id"])) == 1
    kinds = sorted(trace.partition(":")[0] for trace in traces_of(installation.folder, row["id"]))
    assert [kind for kind in kinds if kind in ("processes", "volumes", "rows")] == [
        "processes",
        # Its own and its creation's, which destroying it will unwind.
        "rows",
        "rows",
        "volumes",
    ]


def test_a_stop_goes_on_after_a_crash_at_any_step(installation: LocalInstallation) -> None:
    name = name_of(1)
    installation.run(name, "echo kept >/home/user/kept")
    crash_along(installation, STOPPING, lambda: installation.call("POST", f"/sandboxes/{name}/stop", expected=202))
    row = installation.wait_settled(name)
    assert (row["state"], row["stop_reason"], row["failure"]) == ("stopped", "requested", None)
    kinds = sorted(trace.partition(":")[0] for trace in traces_of(installation.folder, row["id"]))
    assert kinds == ["files", "rows", "rows", "volumes"], "its kept console, its row, its creation's saga, its disk"


def test_a_start_is_resumed_after_a_crash(installation: LocalInstallation) -> None:
    """At as many steps as one start may be resumed, from the first to the last: they are the creation's."""
    name = name_of(1)
    spread = [STARTING[round(index * (len(STARTING) - 1) / (RESUMED_MAX - 1))] for index in range(RESUMED_MAX)]
    assert (spread[0], spread[-1]) == (STARTING[0], STARTING[-1])
    crash_along(installation, spread, lambda: installation.call("POST", f"/sandboxes/{name}/start", expected=202))
    row = installation.wait_settled(name)
    assert (row["state"], row["failure"]) == ("running", None)
    assert installation.run(name, "cat /home/user/kept") == "kept\n"
    check_it_works(installation, name)


def test_a_destruction_goes_on_after_a_crash_at_any_undo(installation: LocalInstallation) -> None:
    name = name_of(0)
    witness = installation.call("GET", f"/sandboxes/{name_of(1)}")
    before = vmm_pids(witness["id"])
    sandbox_id = installation.call("GET", f"/sandboxes/{name}")["id"]
    machines: list[list[int]] = []
    crash_along(
        installation,
        DESTROYING,
        lambda: installation.call("DELETE", f"/sandboxes/{name}", expected=202),
        lambda: machines.append(vmm_pids(sandbox_id)),
    )
    assert machines == [[] for _ in DESTROYING], "the machine goes first"
    with installation.manager.client() as client:
        # The start has gone on with it by itself; this only waits for the end.
        assert client.delete(f"/api/v1/sandboxes/{name}?wait=true").status_code in (204, 404)
    assert traces_of(installation.folder, sandbox_id) == []
    assert vmm_pids(witness["id"]) == before
    check_it_works(installation, witness["name"])
