"""What a sandbox's network policy may say, and what it is refused."""

from __future__ import annotations

import json

import pytest

from atelier.model.errors import InvalidRequestError
from atelier.model.network_policy import (
    MAX_ENTRIES,
    EgressMode,
    EgressPolicy,
    NetworkPolicy,
    parse_domain,
    parse_network,
)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("10.1.2.3/8", "invalid_network", "10.0.0.0/8"),
        ("10.0.0.0/33", "invalid_network", "10.0.0.0/33"),
        ("10.0.0", "invalid_network", "no network"),
        ("", "invalid_network", "no network"),
        ("2001:db8::/32", "invalid_network", "IPv6"),
        ("169.254.169.254", "invalid_network", "169.254.0.0/16"),
        ("127.0.0.1", "invalid_network", "127.0.0.0/8"),
        ("224.0.0.0/4", "invalid_network", "224.0.0.0/4"),
        ("9" * 300, "invalid_network", "…"),
    ],
)
def test_what_is_no_network_is_named(text: str, code: str, said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_network(text)
    assert caught.value.code == code
    assert said in f"{caught.value.message} {caught.value.hint}"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "com", "*", "*.", "*.com", "**.example.com", "a.*.example.com", "*example.com", "example.*"),
        *(
            "exa mple.com",
            "-a.com",
            "a-.com",
            "münchen.de",
            "a" * 64 + ".com",
            ".".join(["a" * 60] * 5),
            "http://a.com",
        ),
        *("a..com", "10.1.2.3", "example.com/path", "x" * 300),
    ],
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_domain(text)
    assert caught.value.code == "invalid_domain"
    assert len(caught.value.message) < 200


def test_names_are_allowed_by_the_list_alone() -> None:
    policy = EgressPolicy.make(EgressMode.LIST, [], ["Example.COM.", "*.example.org"])
    assert policy.domains == ("*.example.org", "example.com")
    for allowed in ("example.com", "EXAMPLE.com", "a.example.org", "a.b.example.org"):
        assert policy.allows_name(allowed), allowed
    for refused in ("www.example.com", "example.org", "badexample.org", "example.com.evil.net", "com", ""):
        assert not policy.allows_name(refused), refused
    assert EgressPolicy().allows_name("anything.at.all")
    assert not EgressPolicy(EgressMode.NONE).allows_name("example.com")


def test_networks_that_overlap_become_one() -> None:
    policy = EgressPolicy.make(EgressMode.LIST, ["10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16", "1.1.1.1"])
    assert [str(network) for network in policy.networks] == ["1.1.1.1/32", "10.0.0.0/8"]


@pytest.mark.parametrize(
    ("mode", "networks", "domains"),
    [
        (EgressMode.NONE, ["1.1.1.1"], []),
        (EgressMode.NONE, [], ["example.com"]),
        (EgressMode.ALL, [], ["example.com"]),
        (EgressMode.LIST, [f"11.{index // 250}.{index % 250}.1" for index in range(MAX_ENTRIES)], ["example.com"]),
    ],
)
def test_policies_that_contradict_themselves_are_refused(
    mode: EgressMode, networks: list[str], domains: list[str]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EgressPolicy.make(mode, networks, domains)
    assert caught.value.code == "invalid_egress_policy"


def test_a_policy_survives_its_journey() -> None:
    policy = NetworkPolicy(EgressPolicy.make(EgressMode.LIST, ["10.1.0.0/16"], ["example.com"]), 10_000, 64)
    assert NetworkPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


@pytest.mark.parametrize(
    "value",
    [
        *(None, [], {}, {"egress": {}}, {"egress": {"mode": "some"}}, {"egress": {"mode": "all", "networks": "x"}}),
        *({"egress": {"mode": ["all"]}}, {"egress": {"mode": "list", "domains": [1]}}),
        *({"egress": {"mode": "all"}, "upload_kbit_per_second": rate} for rate in (0, -1, True, "1", 1.5, 10**12)),
    ],
)
def test_a_malformed_policy_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError):
        NetworkPolicy.from_json(value)
