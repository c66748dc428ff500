"""What the host's services become, by the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.db.engine import Database
from atelier.db.installation import load_installation
from atelier.host_setup import launch
from atelier.model.layout import DataLayout


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "atelier.toml"
    file.write_text(
        f'[server]\ndata_dir = "{tmp_path}/data"\nrun_dir = "{tmp_path}/run"\n[network]\nbridge_name = "sandbr7"\n'
    )
    for name in ("ATELIER_DATA_DIR", "ATELIER_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATELIER_CONFIG", str(file))
    return file


def _become(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[int | None, list[str]]:
    became: list[str] = []
    monkeypatch.setattr("os.execv", lambda program, words: became.extend(words))
    return launch.main([name]), became


async def test_the_network_holder_waits_for_the_database_and_gets_its_id(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _become(monkeypatch, "network") == (75, [])
    data = DataLayout(tmp_path / "data")
    data.root.mkdir()
    database = Database(data.database)
    database.open()
    installation_id = (await load_installation(database)).installation_id
    database.close()
    _, became = _become(monkeypatch, "network")
    assert became[2:4] == ["-m", "atelier.network_holder"]
    options = dict(zip(became[4::2], became[5::2], strict=True))
    assert options["--installation"] == installation_id
    assert (options["--home"], options["--bridge-name"]) == ("host", "sandbr7")
    assert Path(options["--run-dir"]).is_dir(), "made by whoever is first"


def test_the_gateway_gets_the_run_folder(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, became = _become(monkeypatch, "gateway")
    assert became[2:5] == ["-m", "atelier.gateway", "--run-dir"]
    assert Path(became[5]).stat().st_mode & 0o777 == 0o700


def test_a_mistake_in_the_configuration_is_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("[server]\nlisen = 1\n")
    assert _become(monkeypatch, "gateway") == (1, [])
    assert f"{config}:2: there is no setting server.lisen" in capsys.readouterr().err


def test_what_is_no_service_is_refused() -> None:
    assert launch.main(["manager"]) == 2
