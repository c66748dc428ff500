"""Where things lie. Backups, snapshots and a newer manager rely on it: a change here needs a migration."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.model.errors import HostError
from atelier.model.layout import DataLayout, RunLayout, check_socket_path


def test_the_data_folder() -> None:
    data = DataLayout(Path("/d"))
    assert data.lock_file == Path("/d/lock")
    assert data.database == Path("/d/atelier.db")
    assert data.token_file == Path("/d/token.json")
    assert data.volumes == Path("/d/volumes")
    assert data.bases == Path("/d/volumes/bases")
    assert data.consoles == Path("/d/consoles")
    assert data.logs == Path("/d/logs")
    assert data.network_plan == Path("/d/network.json")


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
