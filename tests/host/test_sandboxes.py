"""Sandboxes of a production host: real guests under KVM, on thin volumes, on the host's bridge, by a manager that is an
ordinary user and is killed again and again."""

from __future__ import annotations

import pytest
from tests.host.emulated_host import LVM_DISK_SIZE
from tests.host.production_host import DATA, GROUP, SMALL, Operator, expect_services, wait_until

PROGRAM = "/usr/local/sbin/atelier-privileged"


def test_a_sandbox_lives_through_kills_of_its_manager(operator: Operator) -> None:
    """One in the middle of each operation."""
    host = operator.host
    before = operator.volumes()
    operator.run("create", "--name", "box", *SMALL, "--disk", "5G", "--no-wait")
    operator.kill_manager()
    operator.wait_for_state("box", "running")
    expect_kvm_and_isolation(operator)
    file_system_mib = int(operator.execute("box", "df --output=size --block-size=1M / | tail -n 1"))
    assert file_system_mib > 4600, "larger than the image's"
    assert operator.execute("box", "uname -s; echo words >kept; sync; cat /proc/sys/kernel/hostname") == "Linux\nbox\n"

    machine = operator.vmm_pids()
    operator.run("snapshot", "box", "broken-off", "--no-wait")
    operator.kill_manager()
    assert operator.vmm_pids() == machine, "a guest needs no manager"
    # What a machine stood still for is not taken up again: it has to go on.
    wait_until(lambda: operator.snapshot_state("broken-off") in ("ready", "failed"), 900)
    operator.run("snapshots", "rm", "broken-off")
    operator.run("snapshot", "box", "ready")
    assert operator.execute("box", "echo later >kept; sync; cat kept") == "later\n"
    operator.run("create", "--name", "again", "--snapshot", "ready")
    assert operator.execute("again", "cat kept; cat /proc/sys/kernel/hostname") == "words\nagain\n"
    operator.run("rm", "again")
    operator.run("snapshots", "rm", "ready")

    operator.begin("fork", "box", "--name-prefix", "twin")
    operator.kill_manager()
    # Begun before the kill or not: what there is of it is gone on with, or given up.
    wait_until(lambda: set(operator.states().values()) <= {"running", "failed"}, 900)
    for name in set(operator.states()) - {"box"}:
        operator.run("rm", name)
    operator.run("fork", "box", "--name-prefix", "twin")
    assert operator.execute("twin-1", "cat kept; echo twin >kept; cat kept") == "later\ntwin\n"
    assert len(operator.links()) == len(operator.vmm_pids()) == 2
    operator.run("rm", "twin-1")

    operator.run("stop", "box", "--no-wait")
    operator.kill_manager()
    operator.wait_for_state("box", "stopped")
    assert operator.vmm_pids() == []
    operator.run("start", "box", "--no-wait")
    operator.kill_manager()
    operator.wait_for_state("box", "running")
    assert operator.execute("box", "cat kept") == "later\n"
    operator.run("rm", "box", "--no-wait")
    operator.kill_manager()
    wait_until(lambda: operator.states() == {}, 600)
    assert operator.vmm_pids() == []
    assert operator.links() == []
    assert operator.volumes() == before
    assert host.run(f"ls {DATA}/volumes 2>/dev/null || true").out == ""


def expect_kvm_and_isolation(operator: Operator) -> None:
    host = operator.host
    made = operator.find("box")
    (machine,) = operator.vmm_pids()
    assert "anon_inode:kvm-vm" in host.run(f"ls -l /proc/{machine}/fd").out
    # A jail of Firecracker's has an account of its own.
    owner = host.run(f"stat -c %U /proc/{machine}").out.strip()
    assert owner == "atelier" if operator.vmm == "qemu" else owner not in ("atelier", "root")
    (volume,) = [name for name in operator.volumes() if made["id"] in name]
    assert host.run(f"lvs --noheadings -o segtype {GROUP}/{volume}").out.strip() == "thin"
    (link,) = operator.links()
    assert "isolated on" in host.run(f"bridge -d link show dev {link}").out


@pytest.fixture(scope="module")
def box(operator: Operator) -> str:
    """The name of a sandbox that runs and has a file ``kept`` with ``words`` in it, before and after each test."""
    operator.run("create", "--name", "box", *SMALL)
    operator.execute("box", "echo words >kept; sync")
    return "box"


def test_after_a_reboot_of_the_host_sandboxes_are_there_again(operator: Operator, box: str) -> None:
    operator.run("create", "--name", "stopped", *SMALL)
    operator.execute("stopped", "echo later >kept; sync")
    operator.run("stop", "stopped")
    before = operator.volumes()
    operator.host.reboot()
    operator.host.run("systemctl is-system-running --wait || true", seconds=1500)
    operator.wait_for_manager()
    expect_services(operator.host)
    assert operator.volumes() == before
    assert operator.state_of("stopped") == "stopped"
    operator.wait_for_state(box, "running")
    operator.run("start", "stopped")
    assert operator.execute(box, "cat kept") == "words\n"
    assert operator.execute("stopped", "cat kept") == "later\n"
    operator.run("rm", "stopped")


def test_a_full_pool_is_told_and_nothing_is_lost(operator: Operator, box: str) -> None:
    host = operator.host
    host.run(f"lvcreate -q -V {LVM_DISK_SIZE} -T {GROUP}/atelier -n filler")
    # Until the pool, which LVM extends meanwhile, has only what is kept for those that are there.
    host.run(
        f"""is_full() {{ lvs --noheadings -o data_percent {GROUP}/atelier | awk '{{exit !($1 >= 95.5)}}'; }}
        at=0
        until is_full && sleep 15 && is_full; do
            dd if=/dev/zero of=/dev/{GROUP}/filler bs=1M seek=$at count=64 oflag=direct status=none
            at=$((at + 64))
        done""",
        seconds=1500,
    )
    refused = operator.run("create", "--name", "more", *SMALL, check=False)
    assert refused.status == 1
    assert "disk" in refused.err or "pool" in refused.err, refused.err
    assert "hint:" in refused.err
    assert operator.execute(box, "cat kept; echo more >>kept; sync; cat kept") == "words\nwords\nmore\n"
    host.run(f"lvremove -q -y {GROUP}/filler")
    operator.run("create", "--name", "more", *SMALL)
    operator.run("rm", "more")
    assert operator.execute(box, "cat kept; echo words >kept") == "words\nmore\n"


def test_an_entry_of_sudo_that_was_removed_is_named(operator: Operator, box: str) -> None:
    host = operator.host
    host.run("sed -i.before '/ storage$/d' /etc/sudoers.d/atelier && mv /etc/sudoers.d/atelier.before /root/entries")
    try:
        # The helper that runs was let in before.
        host.run(f"pkill -f '{PROGRAM} storage'")
        refused = operator.run("create", "--name", "more", *SMALL, check=False)
    finally:
        host.run("mv /root/entries /etc/sudoers.d/atelier")
    assert refused.status == 1
    assert f"atelier ALL=(root:root) NOPASSWD: {PROGRAM} storage" in refused.err
    assert "atelier host init" in refused.err
    assert operator.execute(box, "cat kept") == "words\n"
