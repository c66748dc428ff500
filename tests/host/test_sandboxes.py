"""Sandboxes of a production host: real guests under KVM, on thin volumes, on the host's bridge, by a manager that is an
ordinary user and is killed again and again."""

from __future__ import annotations

import json

from tests.host.production_host import DATA, GROUP, Operator, wait_until

SMALL = ("--memory", "192M")
PROGRAM = "/usr/local/sbin/atelier-privileged"


def test_a_sandbox_lives_through_kills_of_its_manager(operator: Operator) -> None:
    host = operator.host
    made = json.loads(operator.run("create", "--name", "box", *SMALL, "--json").out)
    (vmm,) = operator.vmm_pids()
    words = host.run(f"tr '\\0' ' ' </proc/{vmm}/cmdline").out
    assert "accel=kvm" in words or "-accel kvm" in words, words
    assert host.run(f"stat -c %U /proc/{vmm}").out == "atelier\n"
    (volume,) = [name for name in operator.volumes() if made["id"] in name]
    assert host.run(f"lvs --noheadings -o segtype {GROUP}/{volume}").out.strip() == "thin"
    (link,) = operator.links()
    assert "isolated on" in host.run(f"bridge -d link show dev {link}").out
    assert operator.execute("box", "uname -s; echo words >kept; sync; cat /proc/sys/kernel/hostname") == "Linux\nbox\n"

    operator.kill_manager()
    assert operator.vmm_pids() == [vmm], "a guest needs no manager"
    assert operator.execute("box", "cat kept") == "words\n"

    operator.run("snapshot", "box", "ready")
    operator.kill_manager()
    assert operator.execute("box", "echo later >kept; sync; cat kept") == "later\n"
    operator.run("create", "--name", "again", "--snapshot", "ready")
    assert operator.execute("again", "cat kept; cat /proc/sys/kernel/hostname") == "words\nagain\n"
    operator.run("rm", "again")

    operator.run("fork", "box", "--name-prefix", "twin")
    (twin,) = [name for name in operator.names() if name.startswith("twin")]
    operator.kill_manager()
    assert operator.execute(twin, "cat kept") == "later\n"
    assert operator.execute(twin, "echo twin >kept; cat kept") == "twin\n"
    assert len(operator.links()) == len(operator.vmm_pids()) == 2
    operator.run("rm", twin)

    operator.run("stop", "box")
    assert operator.vmm_pids() == []
    operator.kill_manager()
    assert operator.state_of("box") == "stopped"
    operator.run("start", "box")
    assert operator.execute("box", "cat kept") == "later\n"

    operator.run("rm", "box")
    operator.run("snapshots", "rm", "ready")
    assert_nothing_is_left(operator)


def test_what_was_under_way_goes_on_after_a_kill(operator: Operator) -> None:
    operator.run("create", "--name", "box", *SMALL, "--no-wait")
    operator.kill_manager()
    operator.wait_for_state("box", "running")
    assert operator.execute("box", "echo words >kept; sync; cat kept") == "words\n"
    operator.run("stop", "box", "--no-wait")
    operator.kill_manager()
    operator.wait_for_state("box", "stopped")
    operator.run("start", "box", "--no-wait")
    operator.kill_manager()
    operator.wait_for_state("box", "running")
    assert operator.execute("box", "cat kept") == "words\n"
    operator.run("rm", "box", "--no-wait")
    operator.kill_manager()
    wait_until(lambda: operator.names() == [], 600)
    assert_nothing_is_left(operator)


def test_after_a_reboot_of_the_host_sandboxes_are_there_again(operator: Operator) -> None:
    for name in ("running", "stopped"):
        operator.run("create", "--name", name, *SMALL)
        operator.execute(name, f"echo {name} >kept; sync")
    operator.run("stop", "stopped")
    before = operator.volumes()
    operator.host.reboot()
    operator.wait_for_manager()
    assert operator.volumes() == before
    assert operator.state_of("stopped") == "stopped"
    operator.wait_for_state("running", "running")
    operator.run("start", "stopped")
    for name in ("running", "stopped"):
        assert operator.execute(name, "cat kept") == f"{name}\n"


def test_a_full_pool_is_told_and_nothing_is_lost(operator: Operator) -> None:
    host = operator.host
    operator.run("create", "--name", "box", *SMALL)
    operator.execute("box", "echo words >kept; sync")
    host.run(f"lvcreate -q -V 6G -T {GROUP}/atelier -n filler")
    # Until the pool, which LVM extends meanwhile, has only what is kept for those that are there.
    host.run(
        f"""at=0
        while lvs --noheadings -o data_percent {GROUP}/atelier | awk '{{exit $1 >= 95.5}}'; do
            dd if=/dev/urandom of=/dev/{GROUP}/filler bs=1M seek=$at count=64 oflag=direct status=none
            at=$((at + 64))
            sleep 1
        done""",
        seconds=1500,
    )
    refused = operator.run("create", "--name", "more", *SMALL, check=False)
    assert refused.status == 1
    assert "disk" in refused.err or "pool" in refused.err, refused.err
    assert "hint:" in refused.err
    assert operator.execute("box", "cat kept; echo more >>kept; sync; cat kept") == "words\nwords\nmore\n"
    host.run(f"lvremove -q -y {GROUP}/filler")
    operator.run("create", "--name", "more", *SMALL)
    assert operator.execute("box", "cat kept") == "words\nmore\n"


def test_an_entry_of_sudo_that_was_removed_is_named(operator: Operator) -> None:
    host = operator.host
    operator.run("create", "--name", "box", *SMALL)
    host.run("sed -i '/ storage$/d' /etc/sudoers.d/atelier")
    # The helper that runs was let in before.
    host.run(f"pkill -f '{PROGRAM} storage'")
    refused = operator.run("create", "--name", "more", *SMALL, check=False)
    assert refused.status == 1
    assert f"atelier ALL=(root:root) NOPASSWD: {PROGRAM} storage" in refused.err
    assert "atelier host init" in refused.err
    assert operator.execute("box", "echo alive") == "alive\n"


def assert_nothing_is_left(operator: Operator) -> None:
    assert operator.vmm_pids() == []
    assert operator.links() == []
    assert [name for name in operator.volumes() if "-base-" not in name] == []
    assert operator.host.run(f"ls {DATA}/volumes 2>/dev/null || true").out == ""
