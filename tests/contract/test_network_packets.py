"""The bridge network with real packets: what passes, what does not, and that each rule is needed.

In namespaces of the test's own, with guests that are this process at the end of their TAPs.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.contract.packet_flows import try_judging
from tests.contract.packet_table import Guest, Row, Stage, try_row, try_table
from tests.network_lab import (
    BRIDGE,
    HOST_ADDRESS,
    INSTALLATION,
    INTERNET,
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


of_host = pytest.mark.parametrize("lab", [Home.HOST], indirect=True)
of_user = pytest.mark.parametrize("lab", [Home.USER], indirect=True)


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
    wanted = stage.lab.in_home("nft", "list", "ruleset")
    begun = time.monotonic()
    stage.lab.flush_rules()
    wait_until(lambda: stage.lab.in_home("nft", "list", "ruleset") == wanted)
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
    stage.lab.in_internet("ip", "address", "del", f"{LATER_ADDRESS}/32", "dev", "lo")
    stage.lab.in_host("ip", "address", "add", f"{LATER_ADDRESS}/32", "dev", "lo")
    if stage.lab.home is Home.USER:
        # There the host has no rule of ours: this takes as long as the kernel's word of it.
        wait_until(lambda: LATER_ADDRESS in stage.lab.in_home("nft", "list", "ruleset"))
    assert try_row(stage, Row("UDP to the later address", _udp_to_later)) == ""
    assert try_row(stage, Row("TCP to the later address", _tcp_to_later)) == ""


def _udp_to_later(stage: Stage) -> None:
    stage.guest.send(stage.to_gateway(stage.udp_to(LATER_ADDRESS)))


def _tcp_to_later(stage: Stage) -> None:
    stage.guest.send(stage.to_gateway(stage.syn_to(LATER_ADDRESS)))


# --- an ordinary user's processes -------------------------------------------------------------------------------------


@of_user
async def test_pasta_is_started_again(stage: Stage) -> None:
    link = f"at{INSTALLATION}-home"
    (before,) = _processes_with(link)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: _processes_with(link) not in ([], [before]))
    wait_until(lambda: str(stage.lab.plan.uplink_home) in stage.lab.in_home("ip", "address"))
    assert try_table(stage) == []


@of_user
async def test_a_way_out_that_does_not_come_is_told(lab: NetworkLab) -> None:
    lab.in_host("ip", "route", "del", "default")
    lab.start_holder()
    (problem,) = lab.ask("ping")["problems"]
    assert "pasta" in problem
    lab.in_host("ip", "route", "add", "default", "via", NEIGHBOUR_OF_HOST)
    wait_until(lambda: lab.ask("ping")["problems"] == [], 30)


@of_user
async def test_with_the_keeper_all_that_it_started_ends(stage: Stage) -> None:
    link, holder = f"at{INSTALLATION}-home", stage.lab.holder
    assert holder is not None
    assert _processes_with(link) != []
    os.kill(stage.lab.keeper, signal.SIGKILL)
    assert holder.wait(10) == 1, "the manager starts another"
    wait_until(lambda: _processes_with(link) == [])


@of_user
async def test_a_keeper_that_nobody_needs_ends(lab: NetworkLab) -> None:
    lab.start_keeper("--linger-seconds", "8")
    keeper = lab.keeper
    lab.start_holder()
    driver = lab.driver()
    await driver.ensure_slot(GUEST, 0)
    async with driver.opened(GUEST):
        lab.stop_holder()
        time.sleep(12)
        assert lab.keeper == keeper, "a machine holds its TAP"
    wait_until(lambda: not lab.run.network_keeper_socket.exists(), 30)
    wait_until(lambda: _processes_with(f"at{INSTALLATION}-home") == [])


def _processes_with(word: str) -> list[int]:
    """Of pasta: its file has the name of a variant for the processor."""
    found: list[int] = []
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
            if words[0] == b"pasta" and word.encode() in words:
                found.append(int(entry))
    return found


# --- beside others ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("iptables") is None, reason="not installed: iptables")
@pytest.mark.parametrize("lab", [Home.ROOT, Home.HOST], indirect=True)
async def test_beside_docker(lab: NetworkLab) -> None:
    for command in ("-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-P FORWARD DROP", "-I FORWARD -j DOCKER-USER"):
        lab.in_host("iptables", "--wait", *command.split())
    before = lab.in_host("iptables", "-S")
    lab.start_holder()
    async with AsyncExitStack() as stack:
        stage = await open_stage(lab, stack)
        assert lab.ask("ping")["problems"] == []
        assert try_table(stage) == []
        # Docker starts again, and makes its chains anew.
        lab.in_host("iptables", "--wait", "-F", "DOCKER-USER")
        wait_until(lambda: f"atelier_{INSTALLATION}" in lab.in_host("iptables", "-S", "DOCKER-USER"))
        wait_until(lambda: not lab.ask("check")["put_back"])
        lab.in_host("iptables", "--wait", "-A", "DOCKER-USER", "-j", "RETURN")
        assert try_table(stage) == []
    lab.ask("close")
    assert lab.in_host("iptables", "-S") == before


@pytest.mark.parametrize("lab", [Home.ROOT, Home.HOST], indirect=True)
async def test_another_programs_forward_drop_is_told(lab: NetworkLab) -> None:
    lab.start_holder()
    lab.in_host("nft", "table inet wall { chain f { type filter hook forward priority 5; policy drop; }; }")
    (problem,) = lab.ask("ping")["problems"]
    assert "inet wall f" in problem
    assert (BRIDGE if lab.home is Home.HOST else f"at{INSTALLATION}-host") in problem


@of_host
@pytest.mark.parametrize("kind", ["bridge", "veth"])
def test_a_link_of_the_bridges_name_that_is_not_ours_is_left_alone(lab: NetworkLab, kind: str) -> None:
    lab.in_host("ip", "link", "add", BRIDGE, "type", kind)
    before = lab.in_host("ip", "link"), lab.in_host("nft", "list", "ruleset")
    with pytest.raises(RuntimeError, match=rf"has a link {BRIDGE} already.*ATELIER_BRIDGE_NAME"):
        lab.start_holder()
    assert (lab.in_host("ip", "link"), lab.in_host("nft", "list", "ruleset")) == before


@of_host
async def test_others_traffic_passes_the_host_as_before(stage: Stage) -> None:
    """Of somebody who is routed by the host as well, both ways, and of the host itself."""
    other = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "sleep\n")
        in_other = ("nsenter", "--target", str(other.pid), "--net")
        stage.lab.in_host("ip", "link", "add", "dmz", "type", "veth", "peer", "name", "eth0", "netns", str(other.pid))
        stage.lab.in_host("ip", "address", "add", "192.0.2.129/25", "dev", "dmz")
        stage.lab.in_host("ip", "link", "set", "dmz", "up")
        for words in ("address add 192.0.2.130/25 dev eth0", "link set eth0 up", "route add default via 192.0.2.129"):
            subprocess.run([*in_other, "ip", *words.split()], check=True)
        stage.lab.in_internet("ip", "route", "add", "192.0.2.128/25", "via", HOST_ADDRESS)
        in_host = ("nsenter", "--target", str(stage.lab.host.pid), "--net")
        in_internet = ("nsenter", "--target", str(stage.lab.internet.pid), "--net")
        for words, address in ((in_other, INTERNET), (in_host, INTERNET), (in_internet, "192.0.2.130")):
            # Nobody listens there: that it is refused shows that a packet came there, and another back.
            refused = f"import socket; print(socket.create_connection(('{address}', 9), 5))"
            done = subprocess.run([*words, sys.executable, "-c", refused], capture_output=True, text=True)
            assert "ConnectionRefusedError" in done.stderr
    finally:
        other.kill()
        other.wait()
    assert try_table(stage) == []


@of_host
async def test_settings_of_the_host_stay_as_they_are(lab: NetworkLab) -> None:
    names = ("net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.wan.disable_ipv6", "net.ipv4.ip_forward")
    before = [lab.in_host("sysctl", "-n", name) for name in names]
    lab.start_holder()
    await lab.driver().ensure_slot(GUEST, 0)
    assert [lab.in_host("sysctl", "-n", name) for name in names] == before
    for link in (BRIDGE, f"at{INSTALLATION}{GUEST[:8]}"):
        assert lab.in_host("sysctl", "-n", f"net.ipv6.conf.{link}.disable_ipv6") == "1\n"


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
        for number in range(sum(len(_matches(rule)) for rule in _rules_of(run, chain))):
            rule, match = [(rule, match) for rule in _rules_of(run, chain) for match in _matches(rule)][number]
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


def _matches(rule: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in rule["expr"] if "match" in each]


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
        if "chain" in entry and entry["chain"]["table"] == f"atelier_{INSTALLATION}":
            chain = entry["chain"]
            if chain.get("policy") == "drop":
                place = f"{chain['family']} {chain['table']} {chain['name']}"
                yield f"policy of {place}", f"chain {place} {{ policy accept; }}"


@contextmanager
def holder_asleep(lab: NetworkLab) -> Iterator[None]:
    assert lab.holder is not None
    os.kill(lab.holder.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(lab.holder.pid, signal.SIGCONT)


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
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
    assert lab.ask("close")["ok"]
    assert lab.holder is not None
    assert lab.holder.wait(10) == 0
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
    lab.ask("close")
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
    lab.ask("close")
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
