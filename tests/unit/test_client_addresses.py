"""Addresses of managers and of files: what is sent where, byte by byte."""

from __future__ import annotations

import os

import httpx
import pytest

from atelier.client import calls
from atelier.client.addresses import encode_query, encode_segment, is_same_server, normalise_api_url, resolve_target
from atelier.model.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://127.0.0.1:7420", "http://127.0.0.1:7420"),
        ("http://127.0.0.1:7420/", "http://127.0.0.1:7420"),
        ("https://atelier.example.org/api/v1/", "https://atelier.example.org"),
        ("https://example.org/tools/atelier", "https://example.org/tools/atelier"),
        ("http://[::1]:7420", "http://[::1]:7420"),
    ],
)
def test_manager_addresses_lose_what_is_not_theirs(given: str, expected: str) -> None:
    assert normalise_api_url(given) == expected


@pytest.mark.parametrize(
    "given",
    [
        "",
        "127.0.0.1:7420",
        "ftp://host",
        "http://",
        "http://user:pw@host",
        "http://host:99999",
        "http://h\n/x",
        "http://h?x=1",
    ],
)
def test_what_is_no_manager_address_is_refused(given: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        normalise_api_url(given)
    assert caught.value.code == "invalid_api_url"
    assert caught.value.hint


def test_localhost_names_lead_to_this_machine_under_their_own_name() -> None:
    target = resolve_target("http://box.atelier.localhost:7420")
    assert (target.base_url, target.host_header) == ("http://127.0.0.1:7420", "box.atelier.localhost:7420")
    assert target.is_loopback
    assert resolve_target("http://localhost.example.org").host_header is None
    assert not resolve_target("http://localhost.example.org").is_loopback


def test_the_same_server_is_recognised_under_its_names() -> None:
    assert is_same_server("http://localhost:7420/", "http://127.0.0.1:7420")
    assert not is_same_server("http://127.0.0.1:7421", "http://127.0.0.1:7420")
    assert not is_same_server("http://example.org:7420", "http://127.0.0.1:7420")


@pytest.mark.parametrize(
    "raw", [b"/tmp/a b", b"caf\xc3\xa9", b"\xff\xfe/x", b"100%&=+?#", "ä\n".encode(), bytes(range(1, 256))]
)
def test_any_path_survives_the_query(raw: bytes) -> None:
    from urllib.parse import parse_qsl, unquote_to_bytes

    for path in (raw, os.fsdecode(raw)):
        url = httpx.URL("http://host" + calls.files_path("box", path, ""))
        query = url.raw_path.partition(b"?")[2]
        assert unquote_to_bytes(query.removeprefix(b"path=")) == raw
        pairs = parse_qsl(query.decode(), errors="surrogateescape", keep_blank_values=True)
        assert [(key, os.fsencode(value)) for key, value in pairs] == [("path", raw)]


def test_empty_paths_and_nul_bytes_are_refused_before_anything_is_sent() -> None:
    for path in ("", b"", "a\0b"):
        with pytest.raises(InvalidRequestError):
            calls.files_path("box", path, "")


@pytest.mark.parametrize("reference", ["", ".", "..", "x" * 301])
def test_references_that_would_change_the_route_are_refused(reference: str) -> None:
    with pytest.raises(InvalidRequestError):
        calls.get_sandbox(reference)


def test_a_slash_in_a_reference_stays_in_its_segment() -> None:
    assert encode_segment("../../health", "sandbox") == "..%2F..%2Fhealth"
    url = httpx.URL("http://host" + calls.get_sandbox("../../health").path)
    assert url.raw_path == b"/api/v1/sandboxes/..%2F..%2Fhealth"


def test_query_values_are_numbers_text_or_bytes() -> None:
    assert encode_query([("a", 1), ("b", "x y"), ("b", b"\xff")]) == "?a=1&b=x%20y&b=%FF"
    assert encode_query([]) == ""
