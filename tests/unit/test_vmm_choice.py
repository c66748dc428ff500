"""When a production host's machines are Firecracker's."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.manager.vmm_choice import takes_firecracker
from atelier.model.errors import MissingProgramError, VmmError


def _install(path: Path, version: str) -> Path:
    path.write_text(f"#!/bin/sh\necho Firecracker v{version}\n")
    path.chmod(0o755)
    return path


async def test_it_is_taken_where_both_programs_can_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    firecracker, jailer = _install(tmp_path / "firecracker", "1.16.1"), tmp_path / "jailer"
    assert not await takes_firecracker("auto", firecracker, jailer)
    assert "there is no jailer" in caplog.text
    with pytest.raises(MissingProgramError, match="no jailer"):
        await takes_firecracker("firecracker", firecracker, jailer)
    _install(jailer, "1.16.1")
    assert await takes_firecracker("auto", firecracker, jailer)
    assert await takes_firecracker("firecracker", firecracker, jailer)
    assert not await takes_firecracker("qemu", firecracker, jailer)


async def test_one_that_is_too_old_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    firecracker, jailer = _install(tmp_path / "firecracker", "1.11.0"), _install(tmp_path / "jailer", "1.11.0")
    assert not await takes_firecracker("auto", firecracker, jailer)
    assert "1.12.0 or newer is needed" in caplog.text
    with pytest.raises(VmmError) as refusal:
        await takes_firecracker("firecracker", firecracker, jailer)
    assert refusal.value.code == "firecracker_too_old"
    assert "ATELIER_FIRECRACKER" in refusal.value.hint
