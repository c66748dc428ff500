"""The configuration file: what it sets, what wins over it, and how a mistake in it is told."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from atelier.config.errors import InvalidSettingError
from atelier.config.file import ConfigFile, parse_config
from atelier.config.host import load_host_settings
from atelier.config.keys import KEYS, SECTIONS, KeyKind
from atelier.config.schema import config_schema, config_template
from atelier.config.settings import NetworkHome, ServerMode, load_settings
from atelier.model.errors import InvalidRequestError

REPOSITORY = Path(__file__).resolve().parents[2]
NUMBERED = "[server]\nmode = 'mock'\n\n[network]\n"


def _write(folder: Path, text: str) -> dict[str, str]:
    file = folder / "atelier.toml"
    file.write_text(text)
    return {"ATELIER_CONFIG": str(file), "HOME": str(folder)}


def test_values_of_the_file_are_settings(tmp_path: Path) -> None:
    environment = _write(
        tmp_path,
        '[server]\nmode = "mock"\ndata_dir = "/srv/data"\n[network]\nhome = "host"\nbridge_name = "sandbr"\n'
        '[limits]\nrequests_per_second = 12.5\n[sign_in]\nemails = ["Ada@example.org", "bob@example.org"]\n'
        '[storage]\nvolume_group = "fast"\n',
    )
    settings = load_settings(environment=environment)
    assert settings.mode is ServerMode.MOCK
    assert settings.data_dir == Path("/srv/data")
    assert settings.network_home is NetworkHome.HOST
    assert settings.bridge_name == "sandbr"
    assert settings.requests_per_second == 12.5
    assert settings.sign_in.emails == {"ada@example.org", "bob@example.org"}
    assert settings.production.volume_group == "fast"
    assert settings.production.jails_dir == Path("/srv/jails")


def test_a_variable_wins_over_the_file_and_an_option_over_both(tmp_path: Path) -> None:
    environment = _write(tmp_path, '[server]\nmode = "local"\nlisten = "127.0.0.1:1"\n')
    environment["ATELIER_LISTEN"] = "127.0.0.1:2"
    assert load_settings(environment=environment).listen.port == 2
    assert load_settings(environment=environment, listen="127.0.0.1:3", mode="mock").listen.port == 3


@pytest.mark.parametrize(
    "text",
    ['[network]\nbridgeName = "br7"\n', 'network.bridgeName = "br7"\n', '[network]\nbridge_name = "br7"\n'],
)
def test_the_founding_spelling_is_an_alias(tmp_path: Path, text: str) -> None:
    assert load_settings(environment=_write(tmp_path, text)).bridge_name == "br7"


def test_two_spellings_of_one_key_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r":3: network\.bridge_name is set twice"):
        parse_config('[network]\nbridge_name = "a"\nbridgeName = "b"\n', Path("f"))


@pytest.mark.parametrize(
    ("text", "named", "nearest"),
    [
        (NUMBERED + 'bridge_nmae = "br0"\n', "f:5: there is no setting network.bridge_nmae", "network.bridge_name"),
        (NUMBERED + 'bridgName = "br0"\n', "f:5: there is no setting network.bridgName", "network.bridge_name"),
        ('[netwrok]\nbridge_name = "br0"\n', "f:2: there is no setting netwrok.bridge_name", "network.bridge_name"),
        ('[storage]\nvolumegroup = "v"\n', "f:2: there is no setting storage.volumegroup", "storage.volume_group"),
        ('bridge_name = "br0"\n', "f:1: there is no setting bridge_name", "network.bridge_name"),
        ("[netwrok]\n", "f:1: there is no setting netwrok", "network"),
        ('[network.bridge_name]\nx = "y"\n', "f:2: there is no setting network.bridge_name.x", "network.bridge_name"),
    ],
)
def test_a_typo_is_named_with_the_nearest_key(text: str, named: str, nearest: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_config(text, Path("f"))
    assert refused.value.message == named
    assert f"did you mean {nearest}?" in refused.value.hint
    assert refused.value.code == "unknown_setting"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (NUMBERED + "bridge_name = 7\n", "f:5: network.bridge_name is 7", "a word in quotes"),
        ('[limits]\nweb_sockets_per_key = "many"\n', "f:2: limits.web_sockets_per_key is 'many'", "a whole number"),
        ("[limits]\nweb_sockets_per_key = 1.5\n", "f:2: limits.web_sockets_per_key is 1.5", "a whole number"),
        ("[limits]\nrequests_per_second = true\n", "f:2: limits.requests_per_second is True", "a number"),
        ('[sign_in]\nemails = "ada@example.org"\n', "f:2: sign_in.emails is 'ada@example.org'", "a list of words"),
        ('[sign_in]\nemails = ["a", 1]\n', "f:2: sign_in.emails is ['a', 1]", "a list of words"),
        ('[host]\ncaddy = "yes"\n', "f:2: host.caddy is 'yes'", "true or false"),
        ('[network]\nkind = "brigde"\n', "f:2: network.kind is 'brigde'", "did you mean bridge?"),
        ("network = 3\n", "f:1: there is no setting network", "did you mean network"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_line(text: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_config(text, Path("f"))
    assert refused.value.message == message
    assert hint in refused.value.hint


def test_a_value_that_cannot_be_is_told_where_it_stands(tmp_path: Path) -> None:
    environment = _write(tmp_path, '[network]\n# the bridge\nbridge_name = "far too long for a link"\n')
    with pytest.raises(InvalidSettingError) as refused:
        load_settings(environment=environment)
    path = environment["ATELIER_CONFIG"]
    assert refused.value.message == f"{path}:3: network.bridge_name is 'far too long for a link'"
    assert refused.value.code == "invalid_setting"
    environment["ATELIER_BRIDGE_NAME"] = "also much too long for it"
    with pytest.raises(InvalidSettingError, match=r"^ATELIER_BRIDGE_NAME is"):
        load_settings(environment=environment)


@pytest.mark.parametrize("text", ["[network\n", "a = 1\na = 2\n", "key = word\n"])
def test_what_is_no_toml_is_told_with_its_line(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"is no TOML: .*line") as refused:
        parse_config(text, Path("f"))
    assert refused.value.code == "config_invalid"


def test_a_file_that_was_asked_for_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read: No such file") as refused:
        load_settings(environment={"ATELIER_CONFIG": str(tmp_path / "none.toml")})
    assert refused.value.code == "config_unreadable"
    assert load_settings(environment={"ATELIER_CONFIG": "", "HOME": str(tmp_path)}).mode is ServerMode.LOCAL
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequestError, match="is no text"):
        load_settings(environment={"ATELIER_CONFIG": str(tmp_path / "bytes.toml")})


def test_the_template_lists_every_key_and_is_a_file_that_is_taken() -> None:
    template = config_template()
    assert (REPOSITORY / "deploy" / "atelier.toml").read_text() == template, (
        "run: python -c 'from atelier.config.schema import config_template; print(config_template(), end=str())' "
        "> deploy/atelier.toml"
    )
    assert parse_config(template) == ConfigFile()
    everything = config_template({key.path: key.example for key in KEYS})
    assert set(parse_config(everything).values) == {key.path for key in KEYS}


def test_the_schema_knows_the_same_keys_and_kinds() -> None:
    schema = json.loads(json.dumps(config_schema()))
    assert list(schema["properties"]) == list(SECTIONS)
    python_kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
    for key in KEYS:
        found = schema["properties"][key.section]["properties"][key.name]
        example = tomllib.loads(f"x = {key.example}")["x"]
        assert isinstance(example, python_kinds[found["type"]]), key.path
        assert found["description"]
        assert not key.choices or found["enum"] == list(key.choices)
    assert KeyKind("array") is KeyKind.STRINGS


def test_every_variable_of_the_settings_has_a_key() -> None:
    import re

    read = set()
    for file in (REPOSITORY / "src/atelier/config").glob("*.py"):
        if file.name != "keys.py":
            read |= set(re.findall(r'"(ATELIER_[A-Z0-9_]+)"', file.read_text()))
    assert read - {"ATELIER_CONFIG"} <= {key.variable for key in KEYS}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('[host]\nuser = "root"\n', "f:2: host.user is 'root'", "an account of its own"),
        ('[host]\nuser = "A b"\n', "f:2: host.user is 'A b'", "an account of its own"),
        ('[host]\nloop_file = "pool.img"\n', "f:2: host.loop_file is 'pool.img'", "absolute"),
        ('[host]\nloop_file = "/pool.img"\n', "f:2: host.loop_file is '/pool.img'", "storage.volume_group"),
        (
            '[storage]\nvolume_group = "a"\n[host]\nstorage_device = "/dev/x"\nloop_file = "/y"\n',
            "f:5: host.loop_file is '/y'",
            "leave out",
        ),
        ('[host]\nfirecracker = "https://example.org/f.tgz"\n', "f:2: host.firecracker is", "firecracker_sha256"),
        ('[host]\nfirecracker = "http://example.org/f.tgz"\n', "f:2: host.firecracker is", "https://"),
        (
            '[host]\nfirecracker = "/k"\nfirecracker_sha256 = "abc"\n',
            "f:3: host.firecracker_sha256 is 'abc'",
            "64 hexadecimal",
        ),
        ("[host]\nloop_size_gib = 1\n", "f:2: host.loop_size_gib is '1'", "at least 2"),
    ],
)
def test_what_a_host_cannot_be_is_told(text: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidSettingError) as refused:
        load_host_settings(parse_config(text, Path("f")))
    assert refused.value.message.startswith(message)
    assert hint in refused.value.hint
