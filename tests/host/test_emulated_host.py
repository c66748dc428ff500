"""That the emulated host is what the tests beside it take for granted."""

from __future__ import annotations

from tests.host.emulated_host import LVM_DISK, PYTHON, EmulatedHost


def test_it_is_a_debian_with_systemd_device_mapper_kvm_and_the_package(emulated_host: EmulatedHost) -> None:
    assert 'VERSION_ID="12"' in emulated_host.read("/etc/os-release")
    assert emulated_host.run("cat /proc/1/comm").out.strip() == "systemd"
    emulated_host.run("systemctl is-active systemd-networkd")
    version = emulated_host.run("sudo --version").out.split()[2]
    assert tuple(int(number) for number in version.split("p")[0].split(".")) >= (1, 9, 10)
    emulated_host.run(f"pvcreate -q {LVM_DISK} && vgcreate -q vg {LVM_DISK} && lvcreate -q -L 1G -T vg/pool && lvs vg")
    emulated_host.run("modprobe kvm_amd && test -c /dev/kvm")
    assert emulated_host.run(f"{PYTHON} -c 'import atelier; print(atelier.__version__)'").out.strip()
    refused = emulated_host.run("echo seen; echo said >&2; exit 3", check=False)
    assert (refused.status, refused.out, refused.err) == (3, "seen\n", "said\n")


def test_a_power_cut_keeps_what_was_flushed(emulated_host: EmulatedHost) -> None:
    emulated_host.write("/etc/kept", "words\n")
    emulated_host.run("useradd --system somebody && sync")
    emulated_host.pull_the_plug()
    assert emulated_host.read("/etc/kept") == "words\n"
    assert emulated_host.run("id -un", user="somebody").out == "somebody\n"
