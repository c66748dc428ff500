"""What is particular to one home of the network: an ordinary user's processes, and what is beside ours on a host of root's.

The packets are ``test_network_packets``'.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from tests.contract.packet_stage import Stage
from tests.contract.packet_table import try_table
from tests.contract.test_network_packets import GUEST, open_stage, wait_until
from tests.network_lab import (
    BRIDGE,
    HOST_ADDRESS,
    INSTALLATION,
    INTERNET,
    NEIGHBOUR_OF_HOST,
    Home,
    NetworkLab,
    network_lab,
    why_no_lab,
)


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NetworkLab]:
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


of_user = pytest.mark.parametrize("lab", [Home.USER], indirect=True)
of_host = pytest.mark.parametrize("lab", [Home.HOST], indirect=True)
of_root = pytest.mark.parametrize("lab", [Home.ROOT, Home.HOST], indirect=True)


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
    assert holder.wait(60) == 1, "the manager starts another"
    wait_until(lambda: _processes_with(link) == [])


@of_user
async def test_a_keeper_that_nobody_needs_ends(lab: NetworkLab) -> None:
    lab.start_keeper("--linger-seconds", "4")
    keeper = lab.keeper
    lab.start_holder()
    driver = lab.driver()
    await driver.ensure_slot(GUEST, 0)
    async with driver.opened(GUEST):
        lab.stop_holder()
        time.sleep(6)
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
@of_root
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


@of_root
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
