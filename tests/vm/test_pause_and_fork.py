"""Real guests are paused, saved, forked and begun from templates: their programs go on as if nothing had been, and each is
somebody of its own by then."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.footprint import left_of, vmm_pids
from tests.network_lab import HOST_ADDRESS, NetworkLab, network_lab, why_no_lab
from tests.real_machines import NO_QEMU
from tests.running_manager import (
    WITH_TEMPLATES,
    Place,
    RunningManager,
    running_local_manager,
    wait_until,
)
from tests.vm.test_bridge_network import naming, serving

from atelier import Sandbox, Snapshot
from atelier.client.terminal import Terminal
from atelier.drivers.network.addresses import mac_address_of
from atelier.model.errors import NotFoundError
from atelier.model.guest import ProcessOutput, ProcessStarted
from atelier.model.states import UNDER_WAY, SandboxState

T = TypeVar("T")

MEMORY_MIB = 192
PAUSES = 20
FORKS = 20
LOOKED_AT = 4
AT_A_TIME = 4
WAIT_SECONDS = 900.0
CLOCK_SECONDS = 0.1
"""How far a guest's clock may be off, beside what cannot be told while it is read."""

COUNTER = """
import time
with open("/home/user/ticks", "w", buffering=1) as ticks:
    number = 0
    while True:
        ticks.write(f"{number} {time.time_ns()} {time.monotonic_ns()}\\n")
        number += 1
        time.sleep(0.02)
"""

READER = """
def read_generation():
    with open("/run/atelier/generation") as file:
        return file.read().strip()

first, of_another = read_generation(), 0
with open("/dev/urandom", "rb", buffering=0) as device, open("/home/user/blocks", "w", buffering=1) as blocks:
    while of_another < 100:
        generation, block = read_generation(), device.read(16)
        if read_generation() == generation:
            blocks.write(f"{generation} {block.hex()}\\n")
            of_another += generation != first
open("/home/user/blocks-end", "w").close()
"""
"""Reads blocks without a pause, up to the 100th of another generation than the one that it began in. A block that was
read before a restore and would be written down after it, in each fork, is dropped: the generation is another one then."""

UUID_MAKER = """
import os, uuid
os.chdir("/home/user")
os.mkfifo("ask")
os.mkfifo("answer")
while True:
    with open("ask") as ask:
        ask.read()
    with open("answer", "w") as answer:
        answer.write(f"{uuid.uuid4()}\\n")
"""

WHO = """
hostname; cat /etc/machine-id /sys/class/net/eth0/address /run/atelier/generation
cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[NetworkLab | None]:
    """A host and an internet of the test's own, this thread and all that it starts in the host. None where such cannot be
    made: then sandboxes have no way out."""
    if NO_QEMU:
        pytest.skip(NO_QEMU)
    if why_no_lab():
        yield None
        return
    with (
        tempfile.TemporaryDirectory(prefix="atl-") as name,
        network_lab(Path(name)) as made,
        naming(made, Path(name, "heard")),
        serving(made, made.internet.pid, "0.0.0.0", 80),
        made.inside("host"),
    ):
        yield made


@pytest.fixture(scope="module")
def manager(lab: NetworkLab | None) -> Iterator[RunningManager]:
    network = "closed" if lab is None else "bridge"
    with running_local_manager({**WITH_TEMPLATES, "ATELIER_NETWORK": network}, place_in(lab)) as running:
        yield running


def place_in(lab: NetworkLab | None) -> Place:
    """The lab's host: where this thread is, and with the names below /run/netns that networks there have."""
    return list if lab is None else lab.forked_words


@pytest.fixture(scope="module")
def box(manager: RunningManager) -> Iterator[Sandbox]:
    with create(manager, name="box") as made:
        yield made


@pytest.fixture(scope="module")
def forks(box: Sandbox) -> Iterator[list[Sandbox]]:
    """With what was begun and written in their parent before, while and after it was saved."""
    start(box, READER, "/home/user/blocks")
    start(box, UUID_MAKER, "/home/user/answer")
    run(box, "echo kept >/home/user/before")
    made = box.fork(FORKS, name_prefix="fork", wait=False, timeout_seconds=WAIT_SECONDS)
    run(box, "echo own >/home/user/after; pkill -f 'blocks-en[d]'")
    try:
        for fork in made:
            wait_until(lambda fork=fork: fork.refresh().state not in UNDER_WAY, WAIT_SECONDS)
        yield made
    finally:
        on_all(made, lambda fork: fork.destroy())
        for fork in made:
            fork.close()


def create(manager: RunningManager, **wishes: Any) -> Sandbox:
    return Sandbox.create(
        **{"memory_mib": None if "snapshot" in wishes else MEMORY_MIB} | wishes,
        api_url=manager.url,
        api_key=manager.key,
        timeout_seconds=WAIT_SECONDS,
    )


def run(box: Sandbox, script: str, user: str = "") -> str:
    return box.run(script, user=user, check=True).stdout


def start(box: Sandbox, program: str, sign: str) -> None:
    """Returns once ``sign`` is there."""
    box.files.write("/tmp/program", program)
    run(box, f'setsid python3 -c "$(cat /tmp/program)" >/dev/null 2>&1 & until test -e {sign}; do sleep 0.1; done')


def on_all(each: list[T], ask: Callable[[T], Any]) -> list[Any]:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(ask, each))


def check_clock(box: Sandbox) -> None:
    before = time.time()
    shown = float(box.run(["date", "+%s.%N"]).stdout)
    after = time.time()
    assert before - CLOCK_SECONDS <= shown <= after + CLOCK_SECONDS, (before - shown, after - shown)


def read_until(terminal: Terminal, mark: bytes) -> tuple[int, bytes]:
    """The pid of its program, and what was written up to ``mark``."""
    pid, seen = 0, b""
    for event in terminal:
        if isinstance(event, ProcessStarted):
            pid = event.pid
        elif isinstance(event, ProcessOutput):
            seen += event.data
            if mark in seen:
                return pid, seen
    raise AssertionError(f"the terminal ended before {mark!r}: {seen!r}")


def rows(manager: RunningManager, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{manager.data_dir / 'atelier.db'}?mode=ro", uri=True)) as database:
        return database.execute(query).fetchall()


def test_twenty_pauses_are_not_noticed(box: Sandbox) -> None:
    start(box, COUNTER, "/home/user/ticks")
    with box.open_terminal(["/bin/sh"]) as terminal:
        terminal.send(b"cd /tmp; kept=in-$((40+2)); echo scroll-$kept\n")
        pid, _ = read_until(terminal, b"scroll-in-42")
    for number in range(PAUSES):
        if number == PAUSES // 2:
            assert run(box, "umount -l /opt/shared; test -e /opt/shared/bin || echo gone", user="root") == "gone\n"
        assert box.pause(timeout_seconds=WAIT_SECONDS).state is SandboxState.PAUSED
        assert vmm_pids(box.id) == []
        if number % 2:
            box.resume(timeout_seconds=WAIT_SECONDS)
        else:
            assert run(box, "echo woken") == "woken\n"
        assert box.refresh().state is SandboxState.RUNNING
        check_clock(box)
        if number == PAUSES // 2:
            assert " /opt/shared ext4 ro" in run(box, "ls /opt/shared/bin/atelier-init && cat /proc/mounts")
    with box.open_terminal(pid=pid) as terminal:
        terminal.send(b"echo again-$kept-$PWD\n")
        _, seen = read_until(terminal, b"again-in-42-/tmp")
        assert b"scroll-in-42" in seen
        terminal.send(b"exit\n")
    run(box, "pkill -f 'user/tick[s]'")
    counted = [
        tuple(int(word) for word in line.split()) for line in box.files.read_bytes("/home/user/ticks").splitlines()
    ]
    assert [number for number, _, _ in counted] == list(range(len(counted)))
    assert len(counted) > PAUSES
    for clock in (1, 2):
        assert all(before[clock] < after[clock] for before, after in pairwise(counted)), "time goes forward only"


def test_each_fork_is_somebody_of_its_own(manager: RunningManager, box: Sandbox, forks: list[Sandbox]) -> None:
    assert [fork.state for fork in forks] == [SandboxState.RUNNING] * FORKS
    on_all(forks, check_clock)
    everybody = [box, *forks]
    who = [answer.split() for answer in on_all(everybody, lambda each: run(each, WHO))]
    assert [answer[0] for answer in who] == ["box", *(f"fork-{number + 1}" for number in range(FORKS))]
    assert {len(answer) for answer in who} == {5}
    for kind, found in zip(
        ("hostname", "machine-id", "MAC", "generation", "host key"), zip(*who, strict=True), strict=True
    ):
        assert len(set(found)) == 1 + FORKS, kind
    tokens = rows(manager, "SELECT guest_token FROM sandboxes")
    assert len(set(tokens)) == len(tokens) >= 1 + FORKS
    made = on_all(everybody, lambda each: run(each, "echo >/home/user/ask; cat /home/user/answer"))
    assert len(set(made)) == 1 + FORKS, "asked of one process that was running before"


def test_each_fork_has_a_network_of_its_own(lab: NetworkLab | None, box: Sandbox, forks: list[Sandbox]) -> None:
    if lab is None:
        pytest.skip(why_no_lab())
    everybody = [box, *forks]
    addresses = [each.network().address for each in everybody]
    assert len(set(addresses)) == 1 + FORKS
    assert None not in addresses

    def look(number: int) -> list[str]:
        """Its addresses and MAC, what a server in the internet answers it by name, and that its sibling does not."""
        script = f"""
        ip -4 -oneline address show scope global | awk '{{print $4}}' | cut -d/ -f1
        cat /sys/class/net/eth0/address
        curl --silent --max-time 20 http://allowed.example.com/; echo
        ping -c 1 -W 2 {addresses[number - 1]} >/dev/null || echo alone
        """
        return run(everybody[number], script, user="root").split()

    # The MAC was compared in all of them; four programs in each emulated guest take long.
    asked = range(LOOKED_AT)
    assert on_all(list(asked), look) == [
        [addresses[number], mac_address_of(everybody[number].id), HOST_ADDRESS, "alone"] for number in asked
    ]


def test_forks_have_what_was_before_and_nothing_of_what_came_after(forks: list[Sandbox], box: Sandbox) -> None:
    seen = on_all(forks, lambda fork: run(fork, "cd /home/user; cat before; cat after 2>/dev/null || echo none"))
    assert seen == ["kept\nnone\n"] * FORKS
    assert run(box, "cat /home/user/before /home/user/after") == "kept\nown\n"


def test_no_random_block_occurs_twice(forks: list[Sandbox], box: Sandbox) -> None:
    def blocks_of(each: Sandbox) -> list[tuple[str, str]]:
        lines = each.files.read_bytes("/home/user/blocks").decode().splitlines()
        return [(generation, block) for generation, block in (line.split() for line in lines)]

    on_all(forks, lambda fork: run(fork, "until test -e /home/user/blocks-end; do sleep 0.5; done"))
    of_parent = blocks_of(box)
    (first,) = {generation for generation, _ in of_parent}
    drawn = [block for _, block in of_parent]
    for fork in forks:
        blocks = blocks_of(fork)
        own = [(generation, block) for generation, block in blocks if generation != first]
        assert len(own) == 100 and {generation for generation, _ in own} == {
            run(fork, "cat /run/atelier/generation").strip()
        }
        inherited = {block for generation, block in blocks if generation == first}
        assert inherited and inherited < set(drawn), (
            "it was reading when it was saved, and so was its parent afterwards"
        )
        drawn += [block for _, block in own]
    assert len(set(drawn)) == len(drawn) > FORKS * 100


def test_destroy_wins_over_pausing_and_snapshots(manager: RunningManager, forks: list[Sandbox]) -> None:
    pausing, saved = forks.pop(), forks.pop()
    assert pausing.pause(wait=False).state is SandboxState.PAUSING
    doomed = saved.snapshot("doomed", wait=False)
    assert doomed.state == "taking"
    on_all([pausing, saved], lambda fork: fork.destroy())
    for fork in (pausing, saved):
        with pytest.raises(NotFoundError):
            fork.refresh()
        assert left_of(manager, fork.id) == []
        assert rows(manager, f"SELECT kind FROM sagas WHERE subject_id = '{fork.id}'") == []
        fork.close()
    assert "doomed" not in [each.name for each in Snapshot.list(api_url=manager.url, api_key=manager.key)]
    assert left_of(manager, doomed.id) == []
    doomed.close()


def test_a_parent_goes_on_and_another_begins_where_it_was(manager: RunningManager, box: Sandbox) -> None:
    run(box, "sleep 7654 >/dev/null 2>&1 &")
    ready = box.snapshot("ready", timeout_seconds=WAIT_SECONDS)
    run(box, "echo later >/home/user/later; pgrep -f 'sleep 765[4]'")
    with create(manager, name="other", snapshot=ready) as other:
        script = "hostname; pgrep -fc 'sleep 765[4]'; cat /home/user/later 2>/dev/null || echo none"
        assert run(other, script).split() == ["other", "1", "none"]
        check_clock(other)
    ready.delete()
    # The parent's own disk is named after it too.
    assert [each for each in left_of(manager, ready.id) if box.id not in each] == []
    ready.close()
