"""QEMU's argument list: what must stand there, whatever else changes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from atelier.drivers.vmm.qemu_arguments import (
    EmptyDisk,
    MachineDescriptors,
    OpenDisk,
    OpenMemory,
    kernel_command_line,
    machine_arguments,
    process_name,
)
from atelier.model.machine import Disk, DiskFile, NetworkAttachment

DESCRIPTORS = MachineDescriptors(kernel=11, initramfs=12, console=13, control_socket=14, guest_socket=15)
ROOT = OpenDisk(
    Disk(
        "atelier-root",
        DiskFile(Path("/secret/top.qcow2"), "qcow2"),
        (DiskFile(Path("/secret/mid.qcow2"), "qcow2"), DiskFile(Path("/secret/base.img"), "raw")),
    ),
    (21, 22, 23),
    "disk-root",
)
TOOLS = OpenDisk(Disk("atelier-tools", DiskFile(Path("/secret/tools.img"), "raw"), read_only=True), (24,), "disk-tools")


def _arguments(network: NetworkAttachment | None = None, accelerator: str = "tcg") -> list[str]:
    assert accelerator in ("tcg", "kvm")
    return machine_arguments(
        Path("/usr/bin/qemu"),
        process_name("abcd", "aaaaaaaaaaaa"),
        accelerator=accelerator,
        vcpu_count=2,
        memory_mib=300,
        command_line="quiet",
        descriptors=DESCRIPTORS,
        disks=(ROOT, TOOLS),
        network=network,
    )


def _values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(arguments) if name == option]


def _properties(value: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in value.split(","))


def test_everything_that_can_be_denied_is_denied() -> None:
    (sandbox,) = _values(_arguments(), "-sandbox")
    assert sandbox == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def test_the_process_says_whose_it_is() -> None:
    assert _values(_arguments(), "-name") == ["atelier-abcd-aaaaaaaaaaaa"]


def test_no_file_is_named_by_its_path() -> None:
    assert "/secret" not in " ".join(_arguments())


def test_each_file_of_a_chain_is_its_own_node_over_the_next() -> None:
    arguments = _arguments()
    sets = {entry["set"]: entry["fd"] for entry in map(_properties, _values(arguments, "-add-fd"))}
    nodes = [_properties(value) for value in _values(arguments, "-blockdev")]
    files = {node["node-name"]: node for node in nodes if node["driver"] == "file"}
    formats = {node["node-name"]: node for node in nodes if node["driver"] != "file"}
    devices = {
        entry["serial"]: entry["drive"]
        for entry in (_properties(f"device={value}") for value in _values(arguments, "-device"))
        if "serial" in entry
    }

    def descend(name: str) -> list[tuple[str, str, str]]:
        node = formats[name]
        file = files[node["file"]]
        assert file["locking"] == "off"
        assert node["cache.no-flush"] == file["cache.no-flush"] == "off"
        assert node["read-only"] == file["read-only"]
        here = (node["driver"], sets[file["filename"].removeprefix("/dev/fdset/")], node["read-only"])
        return [here, *(descend(node["backing"]) if "backing" in node else [])]

    assert descend(devices["atelier-root"]) == [("qcow2", "21", "off"), ("qcow2", "22", "on"), ("raw", "23", "on")]
    assert descend(devices["atelier-tools"]) == [("raw", "24", "on")]
    # A node must be there before another names it.
    order = [node["node-name"] for node in nodes]
    assert all(order.index(node["backing"]) < order.index(name) for name, node in formats.items() if "backing" in node)


def test_the_user_network_is_closed() -> None:
    arguments = _arguments(NetworkAttachment("user_restricted", "02:00:00:00:00:01"))
    (netdev,) = _values(arguments, "-netdev")
    assert "restrict=on" in netdev.split(",")
    assert "ipv6=off" in netdev.split(",")
    assert "hostfwd" not in netdev
    assert "virtio-net-device,netdev=network,mac=02:00:00:00:00:01" in _values(arguments, "-device")


@pytest.mark.parametrize("network", [None, NetworkAttachment("none")])
def test_no_network_is_no_card(network: NetworkAttachment | None) -> None:
    arguments = _arguments(network)
    assert "-netdev" not in arguments
    assert "virtio-net" not in " ".join(arguments)


def test_the_accelerators() -> None:
    assert _values(_arguments(accelerator="kvm"), "-accel") == ["kvm"]
    (tcg,) = _values(_arguments(), "-accel")
    assert tcg == "tcg,thread=multi,tb-size=64"


def test_only_an_emulated_guest_is_told_the_counters_rate() -> None:
    told = kernel_command_line("tcg", 2_445_426, ("extra",)).split()
    assert {"tsc_early_khz=2445426", "lpj=9781704", "tsc=reliable", "no_timer_check", "extra"} <= set(told)
    assert not any("tsc" in word for word in kernel_command_line("kvm", 2_445_426).split())


def test_memory_is_always_an_object_of_the_same_name_and_size() -> None:
    """Else what one machine has saved would not be found by another."""
    own = _arguments()
    image = _restored(OpenMemory(31, shared=False))
    baking = _restored(OpenMemory(31, shared=True))
    for arguments in (own, image, baking):
        (machine,) = _values(arguments, "-machine")
        assert "memory-backend=ram" in machine.split(",")
        (memory,) = _values(arguments, "-object")
        assert {"id=ram", "size=300M"} <= set(memory.split(","))
    assert _values(own, "-object")[0].startswith("memory-backend-ram,")
    assert _values(image, "-object") == ["memory-backend-file,id=ram,size=300M,mem-path=/proc/self/fd/31,share=off"]
    assert _values(baking, "-object")[0].endswith(",share=on")


def test_a_restored_machine_has_no_kernel_and_waits() -> None:
    arguments = _restored(None)
    assert not {"-kernel", "-initrd", "-append"} & set(arguments)
    assert "-S" in arguments
    assert _values(arguments, "-incoming") == ["defer"]
    assert not {"-S", "-incoming"} & set(_arguments())


def test_all_devices_are_the_same_however_a_machine_begins() -> None:
    baking = _restored(
        OpenMemory(31, shared=True), (EmptyDisk("atelier-root", False), EmptyDisk("atelier-tools", True))
    )

    def devices(arguments: list[str]) -> list[str]:
        return [value.split("drive=")[0] + value.partition(",serial=")[2] for value in _values(arguments, "-device")]

    assert devices(_arguments()) == devices(_restored(None)) == devices(baking)
    nodes = [_properties(value) for value in _values(baking, "-blockdev")]
    assert [(node["driver"], node["read-only"]) for node in nodes] == [("null-co", "off"), ("null-co", "on")]


def _restored(memory: OpenMemory | None, disks: tuple[OpenDisk | EmptyDisk, ...] = (ROOT, TOOLS)) -> list[str]:
    return machine_arguments(
        Path("/usr/bin/qemu"),
        "restored",
        accelerator="tcg",
        vcpu_count=2,
        memory_mib=300,
        command_line="",
        descriptors=MachineDescriptors(console=13, control_socket=14, guest_socket=15),
        disks=disks,
        memory=memory,
    )
