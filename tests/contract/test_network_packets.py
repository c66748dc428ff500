"""The bridge network with real packets: what passes, what does not, and that each rule is needed.

In namespaces of the test's own, with guests that are this process at the end of their TAPs.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.contract.packet_flows import try_judging
from tests.contract.packet_stage import Guest, Row, Stage, try_row
from tests.contract.packet_table import try_table
from tests.network_lab import (
    INSTALLATION,
    LATER_ADDRESS,
    NEIGHBOUR_OF_HOST,
    Home,
    NetworkLab,
    network_lab,
    why_no_lab,
)

from atelier.model.errors import ConflictError
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy

NO_LAB = why_no_lab()
pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

GUEST, NEIGHBOUR = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


@pytest.fixture(params=list(Home))
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NetworkLab]:
    """Of each home."""
    home: Home = request.param
    if missing := why_no_lab(home):
        pytest.skip(missing)
    with network_lab(tmp_path, home) as made:
        yield made


@pytest.fixture
async def stage(lab: NetworkLab) -> AsyncIterator[Stage]:
    lab.start_holder()
    async with AsyncExitStack() as stack:
        yield await open_stage(lab, stack)


async def open_stage(lab: NetworkLab, stack: AsyncExitStack, policy: NetworkPolicy = OPEN_POLICY) -> Stage:
    """``policy``: the guest's; its neighbour has the one of a sandbox that nothing was said of."""
    driver = lab.driver()
    guests: list[Guest] = []
    for lease, (sandbox, each) in enumerate(((GUEST, policy), (NEIGHBOUR, OPEN_POLICY))):
        attachment = await driver.ensure_slot(sandbox, lease, each)
        descriptor = await stack.enter_async_context(driver.opened(sandbox))
        assert descriptor is not None
        guests.append(Guest(descriptor, attachment))
    made = Stage(lab, *guests)
    ears = stack.enter_context(ExitStack())
    made.open(ears)
    return made


async def test_only_the_internet_is_reached(stage: Stage) -> None:
    assert try_table(stage) == []


async def test_rules_that_a_stranger_flushed_are_put_back(stage: Stage) -> None:
    stage.lab.flush_rules()
    wait_until(lambda: not stage.lab.ask("check")["put_back"])
    assert try_table(stage) == []
    assert "published" in stage.lab.in_host("nft", "list", "tables"), "the stranger's own table stays"


async def test_flushed_rules_are_put_back_at_once_and_unasked(stage: Stage) -> None:
    wanted = rules_of(stage)
    begun = time.monotonic()
    stage.lab.flush_rules()
    wait_until(lambda: rules_of(stage) == wanted)
    # The periodic look is five seconds apart: this was the watch.
    print(f"put back after {time.monotonic() - begun:.2f} s")


async def test_a_holder_that_starts_anew_finds_everything(stage: Stage) -> None:
    before = stage.lab.state()
    stage.lab.stop_holder()
    assert stage.lab.state() == before
    stage.lab.start_holder()
    assert await stage.lab.driver().list_slots() == [GUEST, NEIGHBOUR]
    assert stage.lab.state() == before
    assert try_table(stage) == []


async def test_a_holder_that_was_killed_leaves_everything_closed(stage: Stage) -> None:
    assert stage.lab.holder is not None
    stage.lab.holder.kill()
    stage.lab.holder.wait()
    assert try_table(stage) == []


async def test_an_address_that_the_host_gets_later_is_closed_too(stage: Stage) -> None:
    assert try_row(stage, Row("before", _udp_to_later, frozenset({"internet"}), frozenset({"bridge", "self"}))) == ""
    before = rules_of(stage)
    stage.lab.in_internet("ip", "address", "del", f"{LATER_ADDRESS}/32", "dev", "lo")
    stage.lab.in_host("ip", "address", "add", f"{LATER_ADDRESS}/32", "dev", "lo")
    if stage.lab.home is Home.USER:
        # There the host has no rule of ours: this takes as long as the kernel's word of it.
        wait_until(lambda: rules_of(stage) != before)
    assert try_row(stage, Row("UDP to the later address", _udp_to_later)) == ""
    assert try_row(stage, Row("TCP to the later address", _tcp_to_later)) == ""


def rules_of(stage: Stage) -> str:
    """Without the flows that are counted in them, which are the guests' own doing."""
    return re.sub(r"\n\t*elements = {[^}]*ct count[^}]*}", "", stage.lab.in_home("nft", "list", "ruleset"))


def _udp_to_later(stage: Stage) -> None:
    stage.guest.send(stage.to_gateway(stage.udp_to(LATER_ADDRESS)))


def _tcp_to_later(stage: Stage) -> None:
    stage.guest.send(stage.to_gateway(stage.syn_to(LATER_ADDRESS)))


async def test_a_tap_that_a_stranger_deleted_is_made_anew_with_its_rules(lab: NetworkLab) -> None:
    lab.start_holder()
    async with AsyncExitStack() as stack:
        await open_stage(lab, stack)
    for sandbox in (GUEST, NEIGHBOUR):
        lab.in_home("ip", "link", "delete", f"at{INSTALLATION}{sandbox[:8]}")
    async with AsyncExitStack() as stack:
        assert try_table(await open_stage(lab, stack)) == []


# --- each rule is needed ----------------------------------------------------------------------------------------------


async def test_every_rule_is_needed(stage: Stage) -> None:
    """Takes away one rule after the other, while the holder cannot put it back: each time a row has to fail, or a flow. The
    neighbour's own chain, word for word the guest's, is left: the rows are the guest's."""
    needless: list[str] = []
    places = [("home", stage.lab.in_home)]
    if stage.lab.home is Home.ROOT:
        places.append(("host", stage.lab.in_host))
    for place, run in places:

        def found(run: Callable[..., str] = run) -> dict[str, str]:
            """Looked for each time: what was put back has other numbers."""
            commands = weakenings(run("nft", "-j", "list", "ruleset"))
            return {what: command for what, command in commands if NEIGHBOUR[:8] not in command}

        with holder_asleep(stage.lab):
            assert try_judging(stage) == [], "all rules stand"
        wait_until(lambda: not stage.lab.ask("check")["put_back"])
        assert found()
        for what in found():
            with holder_asleep(stage.lab):
                run("nft", found()[what])
                if not (try_table(stage, stop_at_first=True, holder_asleep=True) or try_judging(stage)):
                    needless.append(f"{place}: {what}")
            wait_until(lambda: not stage.lab.ask("check")["put_back"])
    assert try_table(stage) == [], "all is as before"
    assert not needless


async def test_every_condition_on_what_a_guest_sends_is_needed(stage: Stage) -> None:
    """As above, by single conditions of the rules that let a guest's packets pass: of its slot, and on the host."""
    chains = {f"at{INSTALLATION}{GUEST[:8]}": stage.lab.in_home, "from_guests": stage.lab.in_host}
    needless: list[str] = []
    for chain, run in chains.items():
        for number in range(sum(len(_matches(rule, stage.lab.home)) for rule in _rules_of(run, chain))):
            rule, match = [(rule, match) for rule in _rules_of(run, chain) for match in _matches(rule, stage.lab.home)][
                number
            ]
            with holder_asleep(stage.lab):
                weaker = {**rule, "expr": [each for each in rule["expr"] if each is not match]}
                change = {"nftables": [{"replace": {"rule": weaker}}]}
                run("nft", "-j", json.dumps(change))
                if not try_table(stage, stop_at_first=True, holder_asleep=True):
                    needless.append(f"{chain}: {match}")
            wait_until(lambda: not stage.lab.ask("check")["put_back"])
    assert not needless


def _rules_of(run: Callable[..., str], chain: str) -> list[dict[str, Any]]:
    entries = json.loads(run("nft", "-j", "list", "ruleset"))["nftables"]
    return [entry["rule"] for entry in entries if entry.get("rule", {}).get("chain") == chain]


def _matches(rule: dict[str, Any], home: Home) -> list[dict[str, Any]]:
    """But for the link in the host's namespace: it is others' packets that it leaves alone (``test_network_homes``)."""
    found = [each for each in rule["expr"] if "match" in each]
    return [each for each in found if home is not Home.HOST or "iifname" not in str(each)]


@pytest.mark.parametrize("flag", ["isolated off", "flood on"])
async def test_every_flag_of_a_port_is_needed_and_put_back(stage: Stage, flag: str) -> None:
    with holder_asleep(stage.lab):
        for sandbox in (GUEST, NEIGHBOUR):
            tap = f"at{INSTALLATION}{sandbox[:8]}"
            stage.lab.in_home("bridge", "link", "set", "dev", tap, *flag.split())
        assert try_table(stage, stop_at_first=True, holder_asleep=True)
    wait_until(lambda: not stage.lab.ask("check")["put_back"])
    assert try_table(stage) == []


async def test_the_entry_of_a_port_is_needed_and_put_back(stage: Stage) -> None:
    tap = f"at{INSTALLATION}{GUEST[:8]}"
    with holder_asleep(stage.lab):
        stage.lab.in_home("bridge", "fdb", "del", stage.guest.mac, "dev", tap, "master")
        assert try_table(stage, stop_at_first=True, holder_asleep=True)
    wait_until(lambda: not stage.lab.ask("check")["put_back"])
    assert try_table(stage) == []


def weakenings(ruleset: str) -> Iterator[tuple[str, str]]:
    """(what is taken away, nft's command for it) of the tables that are ours."""
    for entry in json.loads(ruleset)["nftables"]:
        if "rule" in entry and entry["rule"]["table"] == f"atelier_{INSTALLATION}":
            rule = entry["rule"]
            if "@asking" in str(rule["expr"]) or "@flows" in str(rule["expr"]):
                continue  # Floods are not in the table: test_network_names and test_network_policies have them.
            place = f"{rule['family']} {rule['table']} {rule['chain']}"
            yield f"rule {place}: {rule['expr']}", f"delete rule {place} handle {rule['handle']}"


@contextmanager
def holder_asleep(lab: NetworkLab) -> Iterator[None]:
    assert lab.holder is not None
    os.kill(lab.holder.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(lab.holder.pid, signal.SIGCONT)


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# --- nothing stays behind ---------------------------------------------------------------------------------------------


async def test_slots_leave_nothing_behind(lab: NetworkLab) -> None:
    lab.start_holder()
    driver = lab.driver()
    ids = [re.sub("[01]", lambda digit: "xy"[int(digit[0])], f"{number:08b}") + "aaaa" for number in range(200)]
    before = lab.state()
    for lease, sandbox in enumerate(ids):
        await driver.ensure_slot(sandbox, lease % 7)
        await driver.ensure_slot_absent(sandbox)
    for lease, sandbox in enumerate(ids):
        await driver.ensure_slot(sandbox, lease)
    assert await driver.list_slots() == sorted(ids)
    await asyncio.gather(*(driver.ensure_slot_absent(sandbox) for sandbox in ids))
    assert lab.state() == before


async def test_a_home_that_is_closed_leaves_nothing_behind(lab: NetworkLab) -> None:
    def found() -> tuple[str, str, str]:
        return lab.in_host("ip", "-br", "link"), lab.in_host("nft", "list", "ruleset"), lab.in_host("ip", "netns")

    before = found()
    lab.start_holder()
    await lab.driver().ensure_slot(GUEST, 0)
    lab.close_home()
    assert found() == before


# --- one holder, one owner of each slot -------------------------------------------------------------------------------


async def test_a_slot_has_one_owner(lab: NetworkLab) -> None:
    lab.start_holder()
    driver = lab.driver()
    await driver.ensure_slot(GUEST, 0)
    with pytest.raises(ConflictError) as refused:
        await driver.ensure_slot(NEIGHBOUR, 0)
    assert refused.value.code == "lease_taken"
    with pytest.raises(ConflictError) as refused:
        await driver.ensure_slot(GUEST[:8] + "bbbb", 1)
    assert refused.value.code == "slot_name_taken"
    async with driver.opened(GUEST):
        with pytest.raises(ConflictError) as refused:
            async with driver.opened(GUEST):
                pass
        assert refused.value.code == "slot_in_use"
    async with driver.opened(GUEST):
        pass


async def test_addresses_stay_and_avoid_the_hosts(lab: NetworkLab) -> None:
    lab.start_holder()
    first = lab.plan
    lab.close_home()
    lab.start_holder()
    assert lab.plan == first, "kept over a restart"
    await lab.driver().ensure_slot(GUEST, 0)
    half = next(first.subnet.subnets())
    lab.in_host("ip", "route", "add", str(half), "via", NEIGHBOUR_OF_HOST)
    (problem,) = lab.ask("ping")["problems"]
    assert str(first.subnet) in problem
    lab.stop_holder()
    lab.start_holder()
    assert lab.plan == first, "kept while a slot stands on it"
    lab.close_home()
    lab.start_holder()
    assert not lab.plan.subnet.overlaps(first.subnet)


@pytest.mark.parametrize("lab", [Home.ROOT, Home.HOST], indirect=True)
def test_without_forwarding_nothing_is_changed(lab: NetworkLab) -> None:
    lab.set_forwarding(False)
    before = lab.in_host("ip", "-br", "link"), lab.in_host("nft", "list", "ruleset")
    with pytest.raises(RuntimeError, match=r"sysctl -w net\.ipv4\.ip_forward=1"):
        lab.start_holder()
    assert (lab.in_host("ip", "-br", "link"), lab.in_host("nft", "list", "ruleset")) == before
    assert lab.in_host("ip", "netns") == ""


@pytest.mark.parametrize(
    "request_line",
    [
        b"no json",
        b"[]",
        b'{"operation": "reboot"}',
        b'{"operation": ["ping"]}',
        b'{"operation": "ensure_slot", "sandbox_id": "../../etc", "lease": 0, "mac_address": "02:00:00:00:00:01"}',
        b'{"operation": "ensure_slot", "sandbox_id": "aaaaaaaaaaaa", "lease": -1, "mac_address": "02:00:00:00:00:01"}',
        b'{"operation": "ensure_slot", "sandbox_id": "aaaaaaaaaaaa", "lease": true, "mac_address": "02:00:00:00:00:01"}',
        b'{"operation": "ensure_slot", "sandbox_id": "aaaaaaaaaaaa", "lease": 5000, "mac_address": "02:00:00:00:00:01", "policy": {"egress": {"mode": "all"}}}',
        b'{"operation": "ensure_slot", "sandbox_id": "aaaaaaaaaaaa", "lease": 0, "mac_address": "ff:ff:ff:ff:ff:ff"}',
        b'{"operation": "ensure_slot", "sandbox_id": "aaaaaaaaaaaa", "lease": 0, "mac_address": "02:00:00:00:00:01 drop"}',
        b'{"operation": "open_slot", "sandbox_id": "aaaaaaaaaaaa"}',
        b"[" * 4000,
    ],
)
async def test_the_holder_refuses_what_is_wrong(lab_of_requests: NetworkLab, request_line: bytes) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(lab_of_requests.run.network_socket))
        connection.sendall(request_line + b"\n")
        answer = json.loads(connection.makefile().readline())
    assert answer["ok"] is False
    assert answer["code"] in ("invalid_request", "no_network_slot")
    assert await lab_of_requests.driver().list_slots() == []


@pytest.fixture(scope="module")
def lab_of_requests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkLab]:
    with network_lab(tmp_path_factory.mktemp("network")) as made:
        made.start_holder()
        yield made
