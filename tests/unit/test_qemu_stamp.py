"""What a saved machine depends on, as the QEMU driver tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.drivers.vmm import processor
from atelier.drivers.vmm.qemu_stamp import make_stamp, read_version
from atelier.model.errors import VmmError

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7B13
stepping\t: 0
flags\t\t: {flags}

processor\t: 1
vendor_id\t: AuthenticAMD
flags\t\t: other
"""


def _program(folder: Path, words: str) -> Path:
    program = folder / "program"
    program.write_text(f"#!/bin/sh\necho '{words}'\n")
    program.chmod(0o755)
    return program


async def test_the_version_is_qemus_own_without_the_packages(tmp_path: Path) -> None:
    said = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
    assert await read_version(_program(tmp_path, said)) == "7.2.22"
    with pytest.raises(VmmError, match="does not say its version"):
        await read_version(_program(tmp_path, "hello"))


def test_under_emulation_the_hosts_processor_does_not_matter_but_its_counter_does() -> None:
    stamp = make_stamp("7.2.22", "tcg", 2_445_426, "tap")
    assert (stamp.vmm, stamp.cpu_model, stamp.cpu_flags, stamp.tsc_khz) == ("qemu-tcg", "max", "", 2_445_426)


def test_under_kvm_the_hosts_processor_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "_CPUINFO", cpuinfo)
    cpuinfo.write_text(CPUINFO.format(flags="fpu vme"))
    stamp = make_stamp("7.2.22", "kvm", 2_445_426, "tap")
    assert (stamp.vmm, stamp.tsc_khz) == ("qemu-kvm", 0)
    assert stamp.cpu_model == "AuthenticAMD 25 1 0 AMD EPYC 7B13"
    cpuinfo.write_text(CPUINFO.format(flags="vme fpu"))
    assert make_stamp("7.2.22", "kvm", 0, "tap") == stamp
    cpuinfo.write_text(CPUINFO.format(flags="fpu vme avx"))
    assert stamp.difference(make_stamp("7.2.22", "kvm", 0, "tap")) == "cpu_flags"
