"""The host names of previews, and the settings from which they come."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.config.settings import load_settings
from atelier.model.errors import InvalidRequestError
from atelier.model.preview import PreviewHost, PreviewSite, parse_port, read_cookies

SITE = PreviewSite("https", "sandboxes.example.org", None)


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("8000-box.sandboxes.example.org", PreviewHost(8000, "box")),
        ("1-a.sandboxes.example.org", PreviewHost(1, "a")),
        ("65535-my-own-box.sandboxes.example.org", PreviewHost(65535, "my-own-box")),
        ("vscode-box.sandboxes.example.org", PreviewHost(8080, "box")),
        ("agent-box.sandboxes.example.org:443", PreviewHost(4096, "box")),
        ("BROWSER-Box.SANDBOXES.example.org", PreviewHost(6080, "box")),
        ("8000-8001-box.sandboxes.example.org", PreviewHost(8000, "8001-box")),
    ],
)
def test_hosts(host: str, found: PreviewHost) -> None:
    assert SITE.parse_host(host) == found


@pytest.mark.parametrize(
    "host",
    [
        "", "sandboxes.example.org", "box.sandboxes.example.org", "0-box.sandboxes.example.org",
        "65536-box.sandboxes.example.org", "00080-box.sandboxes.example.org", "8000-.sandboxes.example.org",
        "8000-a..sandboxes.example.org", "8000-a.b.sandboxes.example.org", "8000-box-.sandboxes.example.org",
        "8000-box.sandboxes.example.org.", "8000-box.example.org", "8000-box.sandboxes.example.org.evil",
        "x8000-box.sandboxes.example.org", "ftp-box.sandboxes.example.org", "8000-bóx.sandboxes.example.org",
        "8000-" + "a" * 41 + ".sandboxes.example.org", "8000-box.sandboxes.example.org/x", "\uff18000-box.sandboxes.example.org",
        "8000-box\n.sandboxes.example.org", "8000-box.sandboxes.example.org@evil",
    ],
)  # fmt: skip
def test_what_is_no_preview(host: str) -> None:
    assert SITE.parse_host(host) is None


def test_addresses() -> None:
    local = PreviewSite("http", "atelier.localhost", 7480)
    assert local.url("box", 8000) == "http://8000-box.atelier.localhost:7480"
    assert local.url("box", 8080) == "http://vscode-box.atelier.localhost:7480"
    assert SITE.url("box", 8000) == "https://8000-box.sandboxes.example.org"
    assert PreviewSite("http", "x", None, "a problem").url("box", 1) == ""
    assert (local.cookie, SITE.cookie) == ("atelier-preview", "__Host-atelier-preview")


def test_ports_in_words() -> None:
    assert [parse_port(each) for each in ("1", "65535", "vscode", "agent", "browser")] == [1, 65535, 8080, 4096, 6080]
    for wrong in ("0", "65536", "", "-1", "+1", "٣", "1.0", "x" * 1000):
        with pytest.raises(InvalidRequestError):
            parse_port(wrong)


def test_cookies_of_one_name_are_all_read() -> None:
    assert read_cookies("a=1; b=2;a=3; aa=4; a", "a") == ["1", "3", ""]


def previews(tmp_path: Path, **variables: str):
    environment = {"HOME": str(tmp_path), **{f"ATELIER_{name}": value for name, value in variables.items()}}
    return load_settings(environment=environment).previews


def test_where_previews_are_served(tmp_path: Path) -> None:
    usual = previews(tmp_path)
    assert (usual.scheme, usual.domain, str(usual.listen)) == ("http", "atelier.localhost", "127.0.0.1:7480")
    assert str(previews(tmp_path, LISTEN="127.0.0.1:0").listen) == "127.0.0.1:0", "a second manager's"
    assert str(previews(tmp_path, PREVIEWS_LISTEN="127.0.0.1:9000").listen) == "127.0.0.1:9000"
    assert previews(tmp_path, PREVIEWS_LISTEN="off").is_off
    public = previews(tmp_path, PUBLIC_URL="https://atelier.example.org")
    assert (public.scheme, public.domain, public.port) == ("https", "sandboxes.atelier.example.org", None)
    assert (public.listen, public.socket) == (None, None)
    own = previews(
        tmp_path,
        PUBLIC_URL="https://atelier.example.org",
        SANDBOX_DOMAIN="Boxes.example:8443",
        PREVIEWS_LISTEN="unix:/run/edge/p.sock",
    )
    assert (own.domain, own.port, own.socket) == ("boxes.example", 8443, Path("/run/edge/p.sock"))
    for variables in (
        {"SANDBOX_DOMAIN": "https://x.org"}, {"SANDBOX_DOMAIN": "x"}, {"SANDBOX_DOMAIN": "a.b:0"},
        {"SANDBOX_DOMAIN": "-a.b"}, {"PREVIEWS_LISTEN": "unix:relative"}, {"PREVIEWS_LISTEN": "nonsense"},
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError) as refused:
            previews(tmp_path, **variables)
        assert refused.value.code == "invalid_setting"
