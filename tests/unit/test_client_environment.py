"""Which manager, and which key: and that a local key goes to no other address."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atelier.client.environment import find_data_directory, find_endpoint, find_local_data
from atelier.config.settings import load_settings
from atelier.model.errors import AuthenticationError, HostError
from atelier.model.layout import DataLayout


def write_token(folder: Path, api_url: str = "http://127.0.0.1:7420", api_key: str = "local-key") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    DataLayout(folder).token_file.write_text(json.dumps({"api_url": api_url, "api_key": api_key}))


def test_the_environment_comes_before_the_token_file(tmp_path: Path) -> None:
    write_token(tmp_path)
    variables = {"ATELIER_DATA_DIR": str(tmp_path), "ATELIER_API_URL": "http://other:1", "ATELIER_API_KEY": "k"}
    endpoint = find_endpoint(variables=variables)
    assert (endpoint.api_url, endpoint.api_key) == ("http://other:1", "k")


def test_without_variables_the_token_file_says_all(tmp_path: Path) -> None:
    write_token(tmp_path, "http://127.0.0.1:5555/")
    endpoint = find_endpoint(variables={"ATELIER_DATA_DIR": str(tmp_path)})
    assert (endpoint.api_url, endpoint.api_key) == ("http://127.0.0.1:5555", "local-key")
    assert "local-key" not in repr(endpoint)


def test_the_local_key_is_never_sent_to_another_address(tmp_path: Path) -> None:
    write_token(tmp_path)
    with pytest.raises(AuthenticationError) as caught:
        find_endpoint(variables={"ATELIER_DATA_DIR": str(tmp_path), "ATELIER_API_URL": "http://evil.example:7420"})
    assert caught.value.code == "no_api_key"


def test_the_local_key_fits_another_name_of_the_same_server(tmp_path: Path) -> None:
    write_token(tmp_path)
    variables = {"ATELIER_DATA_DIR": str(tmp_path), "ATELIER_API_URL": "http://atelier.localhost:7420"}
    assert find_endpoint(variables=variables).api_key == "local-key"


def test_the_data_folder_is_local_only_for_its_own_manager(tmp_path: Path) -> None:
    variables = {"ATELIER_DATA_DIR": str(tmp_path)}
    assert find_local_data(variables=variables) == DataLayout(tmp_path)
    write_token(tmp_path)
    assert find_local_data(variables=variables | {"ATELIER_API_URL": "http://127.0.0.1:7420/"}) == DataLayout(tmp_path)
    assert find_local_data(variables=variables | {"ATELIER_API_URL": "http://other.example:7420"}) is None
    assert find_local_data(api_url="http://other.example:7420", variables=variables) is None


def test_nothing_known_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError) as caught:
        find_endpoint(variables={"ATELIER_DATA_DIR": str(tmp_path / "none")})
    assert "atelier up" in caught.value.hint


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"api_url": 1, "api_key": "x"}', "\xff"])
def test_a_damaged_token_file_is_said_so(tmp_path: Path, content: str) -> None:
    DataLayout(tmp_path).token_file.write_text(content, "latin-1")
    with pytest.raises(HostError) as caught:
        find_endpoint(variables={"ATELIER_DATA_DIR": str(tmp_path)})
    assert caught.value.code == "token_file_damaged"


@pytest.mark.parametrize(
    "variables",
    [
        {"HOME": "/h"},
        {"HOME": "/h", "XDG_DATA_HOME": "/x"},
        {"HOME": "/h", "XDG_DATA_HOME": "relative"},
        {"HOME": "/h", "XDG_DATA_HOME": "/x", "ATELIER_DATA_DIR": "/d"},
    ],
)
def test_the_client_looks_where_the_manager_writes(variables: dict[str, str]) -> None:
    assert find_data_directory(variables=variables) == load_settings(environment=variables).data_dir
