"""The guest's card, set for real: on a TAP in a network namespace of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.real_machines import REPOSITORY, missing_programs

SCRIPT = """
import sys, fcntl, os, struct, subprocess
from pathlib import Path
from atelier.guest_agent import network
network.RESOLV_CONF, network.CARDS = sys.argv[1:3]
settings = network.NetworkSettings({
    "address": "10.9.3.7", "prefixLength": 16, "gateway": "10.9.0.1", "nameserver": "10.9.0.2",
})
mac = network.parse_mac_address("02:00:00:00:00:07")
def show(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
def expect_no_card(why):
    try:
        network.apply(settings, mac)
    except Exception as error:
        assert "no network card" in str(error), error
    else:
        raise AssertionError(why)
expect_no_card("there is no card yet")
subprocess.run(["ip", "link", "add", "bridge0", "type", "bridge"], check=True)
for name in ("bridge0", "card0"):
    # As sysfs shows it: a TAP, too, is no machine's card, here it stands for one.
    folder = Path(network.CARDS, name)
    folder.mkdir()
    (folder / "type").write_text("1\\n")
expect_no_card("a bridge is no card")
(folder / "device").mkdir()
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"card0", 0x1002))  # TUNSETIFF, IFF_TAP | IFF_NO_PI
for _ in range(2):
    network.apply(settings, mac)
    link, address, routes = show("link", "show", "card0"), show("addr", "show", "card0"), show("route")
    assert "02:00:00:00:00:07" in link and ",UP" in link, link
    assert "10.9.3.7/16" in address, address
    assert "default via 10.9.0.1 dev card0" in routes, routes
    assert Path(sys.argv[1]).read_text() == "nameserver 10.9.0.2\\n"
moved = network.NetworkSettings({
    "address": "10.9.3.8", "prefixLength": 16, "gateway": "10.9.0.9", "nameserver": "10.9.0.2",
})
network.apply(moved, network.parse_mac_address("02:00:00:00:00:08"))
network.apply(moved, None)
assert "inet" not in show("addr", "show", "bridge0") and "UP" not in show("link", "show", "bridge0")
link, address, routes = show("link", "show", "card0"), show("addr", "show", "card0"), show("route")
assert "02:00:00:00:00:08" in link and ",UP" in link, link
assert "10.9.3.8/16" in address and "10.9.3.7" not in address, address
assert routes.count("default") == 1 and "default via 10.9.0.9 dev card0" in routes, routes
network.apply(None, mac)
link, address = show("link", "show", "card0"), show("addr", "show", "card0")
assert "02:00:00:00:00:07" in link and ",UP" in link and "10.9.3.8/16" in address, (link, address)
network.apply(settings, mac)
other = network.NetworkSettings({
    "address": "10.9.3.7", "prefixLength": 16, "gateway": "10.9.0.9", "nameserver": "10.9.0.2",
})
network.apply(other, mac)
assert show("route").count("default via 10.9.0.9 dev card0") == 1, "the same card, another way out"
os.unlink(sys.argv[1])
os.symlink("/nonexistent/stub", sys.argv[1])
network.apply(settings, mac)
assert os.path.islink(sys.argv[1]), "a resolver of the image's own is left alone"
"""


def no_namespace() -> str:
    if missing := missing_programs("unshare", "ip"):
        return missing
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        return "no network namespace can be made here"
    return "" if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "no /dev/net/tun"


NO_NAMESPACE = no_namespace()


@pytest.mark.skipif(bool(NO_NAMESPACE), reason=NO_NAMESPACE)
def test_the_card_is_set(tmp_path: Path) -> None:
    cards = tmp_path / "cards"
    cards.mkdir()
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", SCRIPT, str(tmp_path / "resolv.conf"), str(cards)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
