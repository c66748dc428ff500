"""``atelier host``: what is in the way on a bare Debian is told; a host that was made tells what is missing, and is taken
back."""

from __future__ import annotations

import pytest
from tests.host.emulated_host import LVM_DISK, PYTHON, EmulatedHost, SavedHost
from tests.host.production_host import (
    BRIDGE,
    CONFIG,
    GROUP,
    Making,
    expect_services,
    prepare_bare_host,
    run_host,
    state_of_machine,
)

_AS_IT_WAS = f"""
for link in br0 {BRIDGE}; do ip link del $link 2>/dev/null || true; done
! vgs {GROUP} >/dev/null 2>&1 || vgremove -q -f -y {GROUP}
! pvs {LVM_DISK} >/dev/null 2>&1 || pvremove -q {LVM_DISK}
wipefs -q -a {LVM_DISK}
! id -u atelier >/dev/null 2>&1 || userdel atelier
"""


@pytest.fixture(scope="module")
def bare_host(shared_host: EmulatedHost) -> EmulatedHost:
    prepare_bare_host(shared_host)
    return shared_host


@pytest.fixture(scope="module")
def bare_state(bare_host: EmulatedHost) -> str:
    return state_of_machine(bare_host)


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
    bare_host: EmulatedHost, bare_state: str, begins: str, config: str, said: str
) -> None:
    bare_host.run(begins)
    try:
        bare_host.write("/root/other.toml", config)
        refused = run_host(bare_host, "init", "--config", "/root/other.toml", "--yes", check=False)
        assert refused.status == 1
        assert said in refused.err
        # A change is noted there before it is made. The next test compares all that could have been changed.
        bare_host.run("test ! -e /var/lib/atelier")
    finally:
        bare_host.run(_AS_IT_WAS)


def test_what_would_be_changed_is_shown_and_nothing_is_changed(bare_host: EmulatedHost, bare_state: str) -> None:
    shown = run_host(bare_host, "init", "--config", "/root/host.toml", "--check")
    assert f"make the volume group {GROUP} on {LVM_DISK}" in shown.err
    assert state_of_machine(bare_host) == bare_state


def test_what_was_cut_off_was_told_and_is_gone_on_with(
    made_production_host: tuple[SavedHost, Making], production_host: EmulatedHost
) -> None:
    _, making = made_production_host
    assert "was interrupted at services" in making.interrupted
    assert "to be done: start atelier-network" in making.interrupted
    expect_services(production_host)
    again = run_host(production_host, "init", "--yes")
    assert "nothing is to be changed" in again.err
    found = run_host(production_host, "doctor", check=False)
    assert found.status == 0, found.out
    listed = production_host.run(f"cd / && {PYTHON} -P -m atelier.cli ls --json", user="atelier")
    assert listed.out.strip() == "[]"


def test_an_entry_of_sudo_that_is_missing_is_told(production_host: EmulatedHost) -> None:
    production_host.run("mv /etc/sudoers.d/atelier /root/entry")
    found = run_host(production_host, "doctor", check=False)
    production_host.run("mv /root/entry /etc/sudoers.d/atelier")
    assert found.status == 1
    assert "atelier may not start /usr/local/sbin/atelier-privileged" in found.out


def test_a_host_that_is_taken_back_is_as_it_was(
    made_production_host: tuple[SavedHost, Making], production_host: EmulatedHost
) -> None:
    _, making = made_production_host
    done = run_host(production_host, "uninstall", "--remove-data", "--packages", "--yes")
    assert "kept:" not in done.err, done.err
    assert state_of_machine(production_host) == making.bare_state
