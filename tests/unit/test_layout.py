"""Where things lie. Backups, snapshots and a newer manager rely on it: a change here needs a migration."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.model.errors import HostError
from atelier.model.layout import CacheLayout, DataLayout, RunLayout, check_socket_path


def test_the_data_folder() -> None:
    data = DataLayout(Path("/d"))
    assert data.lock_file == Path("/d/lock")
    assert data.database == Path("/d/atelier.db")
    assert data.token_file == Path("/d/token.json")
    assert data.volumes == Path("/d/volumes")
    assert data.snapshot("bbbbbbbbbbbb") == Path("/d/snapshots/bbbbbbbbbbbb")
    assert data.saved_memory("aaaaaaaaaaaa") == Path("/d/paused/aaaaaaaaaaaa.memory")
    assert data.saved_tools("aaaaaaaaaaaa") == Path("/d/paused/aaaaaaaaaaaa.tools")
    assert data.consoles == Path("/d/consoles")
    assert data.logs == Path("/d/logs")
    assert data.network_plan == Path("/d/network.json")


def test_disks_in_the_data_folder() -> None:
    disks = DataLayout(Path("/d")).disks
    sandbox, snapshot = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
    assert disks.volume(sandbox) == Path("/d/volumes/aaaaaaaaaaaa.qcow2")
    assert disks.next_top(sandbox, snapshot) == Path("/d/volumes/aaaaaaaaaaaa-bbbbbbbbbbbb.qcow2.next")
    assert disks.bases == Path("/d/volumes/bases")
    assert disks.layer(sandbox, snapshot, 1) == Path("/d/volumes/layers/aaaaaaaaaaaa-bbbbbbbbbbbb-1.qcow2")
    assert disks.origin(sandbox, snapshot) == Path("/d/volumes/layers/aaaaaaaaaaaa-from-bbbbbbbbbbbb.qcow2")
    assert disks.snapshot_disk(snapshot) == Path("/d/volumes/snapshots/bbbbbbbbbbbb.qcow2")
    assert disks.snapshot_layer(snapshot) == Path("/d/volumes/snapshots/bbbbbbbbbbbb.qcow2.layer")
    assert disks.snapshot_checksum(snapshot) == Path("/d/volumes/snapshots/bbbbbbbbbbbb.sha256")
    assert disks.snapshot_origin(snapshot) == Path("/d/volumes/origins/bbbbbbbbbbbb.qcow2")


def test_the_cache_folder() -> None:
    cache = CacheLayout(Path("/c"))
    assert cache.template("0123") == Path("/c/templates/0123")
    assert cache.templates_lock == Path("/c/templates/lock")


def test_the_run_folder() -> None:
    run = RunLayout(Path("/r"))
    assert run.vmm_directory("aaaaaaaaaaaa") == Path("/r/sandboxes/aaaaaaaaaaaa")
    assert run.channel_socket("aaaaaaaaaaaa") == Path("/r/channels/aaaaaaaaaaaa.sock")
    assert run.gateway_socket == Path("/r/gateway.sock")
    assert run.network_socket == Path("/r/network.sock")
    assert run.network_policies == Path("/r/network")


def test_socket_paths_are_as_long_as_the_kernel_takes() -> None:
    check_socket_path(Path("/" + "x" * 106))
    with pytest.raises(HostError) as refused:
        check_socket_path(Path("/" + "x" * 107))
    assert refused.value.code == "path_too_long"
