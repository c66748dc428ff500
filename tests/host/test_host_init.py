"""``atelier host`` on a bare Debian: a host is made, lives through a reboot, tells what is missing, and is taken back."""

from __future__ import annotations

import pytest
from tests.host.emulated_host import LVM_DISK, PYTHON, EmulatedHost
from tests.host.production_host import BRIDGE, CONFIG, GROUP, HOST, SERVICES, prepare_bare_host

# What a package manager, services of others and the clock write by themselves is nobody's change.
_STATE = r"""
dpkg-query -W -f '${Package} ${db:Status-Status}\n'
ip -brief link | awk '{print $1}'
nft list ruleset
sysctl net.ipv4.ip_forward
cat /etc/passwd /etc/group /etc/subuid
vgs --noheadings; lvs --noheadings; wipefs /dev/vdb
systemctl list-unit-files --no-legend | grep -i atelier | grep -v test-agent || true
find /etc /usr/local /opt/atelier /var/lib/atelier /run/atelier* /dev/atelier -not -path '/etc/lvm/archive*' -not -path '/etc/lvm/backup*' \
    -not -path '/etc/lvm/devices*' -not -name '*.pyc' -not -name __pycache__ -not -name 'passwd-' -not -name 'group-' \
    -not -name 'subuid-' -not -name 'subgid-' -not -name 'shadow*' -not -name 'gshadow*' -not -name '.pwd.lock' \
    -not -name 'ld.so.cache' -type f -printf '%p %m %u:%g %s\n' 2>/dev/null | sort || true
"""

_AS_IT_WAS = f"""
for link in br0 {BRIDGE}; do ip link del $link 2>/dev/null || true; done
! vgs {GROUP} >/dev/null 2>&1 || vgremove -q -f -y {GROUP}
! pvs {LVM_DISK} >/dev/null 2>&1 || pvremove -q {LVM_DISK}
wipefs -q -a {LVM_DISK}
! id -u atelier >/dev/null 2>&1 || userdel atelier
"""


@pytest.fixture(scope="module")
def host(shared_host: EmulatedHost) -> EmulatedHost:
    prepare_bare_host(shared_host)
    return shared_host


@pytest.mark.parametrize(
    ("begins", "config", "said"),
    [
        (f"ip link add {BRIDGE} type bridge", CONFIG, f"this host has a link {BRIDGE} already"),
        ("ip link add br0 type bridge", CONFIG.replace("bridgeName", "#"), "this host has a link br0 already"),
        (f"mke2fs -q {LVM_DISK}", CONFIG, f"{LVM_DISK} is not empty"),
        ("true", CONFIG.replace("storage_device", "#"), f"this host has no volume group {GROUP}"),
        ("useradd --system atelier", CONFIG, "the user atelier is there, and not of Atelier's making"),
        ("true", CONFIG.replace("volume_group", "volume_grup"), "did you mean storage.volume_group?"),
        (
            f"pvcreate -q {LVM_DISK} && vgcreate -q {GROUP} {LVM_DISK} && lvcreate -q -L 8M -n atelier {GROUP}",
            CONFIG.replace("storage_device", "#"),
            f"{GROUP}/atelier is there, and no thin pool",
        ),
    ],
)
def test_what_is_in_the_way_is_told_and_nothing_is_changed(
    host: EmulatedHost, begins: str, config: str, said: str
) -> None:
    host.run(begins)
    try:
        host.write("/root/other.toml", config)
        before = host.run(_STATE).out
        refused = host.run(f"{HOST} init --config /root/other.toml --yes", seconds=600, check=False)
        assert refused.status == 1
        assert said in refused.err
        assert host.run(_STATE).out == before
    finally:
        host.run(_AS_IT_WAS)


def test_a_host_is_made_lives_and_is_taken_back(host: EmulatedHost) -> None:
    before = host.run(_STATE).out
    shown = host.run(f"{HOST} init --config /root/host.toml --check", seconds=600)
    assert "make the volume group sandboxes on /dev/vdb" in shown.err
    assert host.run(_STATE).out == before, "--check changes nothing"

    _cut_off(host, f"{HOST} init --config /root/host.toml --yes", "make the thin pool")
    _cut_off(host, f"{HOST} init --yes", "start atelier-network")
    found = host.run(f"{HOST} doctor", seconds=600, check=False)
    assert "was interrupted at services" in found.out
    host.run(f"{HOST} init --yes", seconds=1500)
    _expect_running(host)
    again = host.run(f"{HOST} init --yes", seconds=600)
    assert "nothing is to be changed" in again.err
    found = host.run(f"{HOST} doctor", seconds=600, check=False)
    assert "FAIL" not in found.out.replace("FAIL  network: there is no", ""), found.out
    listed = host.run(f"cd / && {PYTHON} -P -m atelier.cli ls --json", user="atelier", seconds=300)
    assert listed.out.strip() == "[]"

    host.reboot()
    host.run("systemctl is-system-running --wait || true", seconds=1500)
    _expect_running(host)

    host.run("mv /etc/sudoers.d/atelier /root/entry")
    found = host.run(f"{HOST} doctor", seconds=600, check=False)
    assert found.status == 1
    assert "atelier may not start /usr/local/sbin/atelier-privileged" in found.out
    host.run("mv /root/entry /etc/sudoers.d/atelier")

    done = host.run(f"{HOST} uninstall --remove-data --packages --yes", seconds=1500)
    assert "kept:" not in done.err, done.err
    assert host.run(_STATE).out == before


def _cut_off(host: EmulatedHost, command: str, moment: str) -> None:
    """Kill it when it says that it begins with ``moment``."""
    host.run(
        f"""({command}) >/dev/null 2>/root/progress & pid=$!
        until grep -q '{moment}.*\\.\\.\\.$' /root/progress; do kill -0 $pid; sleep 0.2; done
        pkill -KILL -P $pid; kill -KILL $pid || true""",
        seconds=1500,
    )


def _expect_running(host: EmulatedHost) -> None:
    for name in SERVICES:
        state = host.run(f"systemctl is-active {name}", check=False).out.strip()
        assert state == "active", host.run(f"journalctl -u {name} -n 40 --no-pager").out
        pid = host.run(f"systemctl show --property=MainPID --value {name}").out.strip()
        status = host.read(f"/proc/{pid}/status")
        assert "\nUid:\t0" not in status, f"{name} is not root's"
        if name == "atelier-manager":
            assert "NoNewPrivs:\t0" in status
    host.run("sudo -n -l -- /usr/local/sbin/atelier-privileged storage", user="atelier")
    assert BRIDGE in host.run("ip -brief link").out
