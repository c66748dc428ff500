"""How the command line reads rates, and the words it has for a network."""

from __future__ import annotations

import click
import pytest

from atelier.cli.describing import describe_network, show_egress, show_rate
from atelier.cli.invocation import RATE, RATE_OR_NONE
from atelier.schemas.networks import NetworkPolicy, NetworkUsage, SandboxNetwork


@pytest.mark.parametrize(
    ("text", "kbit"),
    [
        *(("512kbit", 512), ("10mbit", 10_000), ("1.5Mbit", 1500), ("1gbit", 1_000_000), (" 2 mbit/s ", 2000)),
        *(("0.064mbit", 64), ("100Mbitps", 100_000)),
    ],
)
def test_rates(text: str, kbit: int) -> None:
    assert RATE.convert(text, None, None) == kbit
    assert RATE.convert(show_rate(kbit), None, None) == kbit


@pytest.mark.parametrize(
    "text", ["10", "10mb", "10 MiB", "mbit", "-1mbit", "1e3kbit", "\u0663mbit", "none", "", "1.2.3mbit"]
)
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write 512kbit, 10mbit or 1gbit"):
        RATE.convert(text, None, None)


def test_none_lifts_a_limit_where_there_is_one_to_lift() -> None:
    assert RATE_OR_NONE.convert("None", None, None) == "none"
    with pytest.raises(click.BadParameter, match="or none"):
        RATE_OR_NONE.convert("never", None, None)


def policy(mode: str, networks: list[str], domains: list[str]) -> NetworkPolicy:
    return NetworkPolicy.model_validate({"egress": {"mode": mode, "networks": networks, "domains": domains}})


@pytest.mark.parametrize(
    ("mode", "networks", "domains", "said"),
    [
        ("all", [], [], "all"),
        ("none", [], [], "none"),
        ("all", ["10.1.0.0/16"], [], "all and 10.1.0.0/16"),
        ("list", [], [], "list (empty)"),
        ("list", ["10.1.0.0/16"], ["github.com"], "list (github.com, 10.1.0.0/16)"),
        ("list", [], ["a.com", "b.com", "c.com", "d.com"], "list (4 entries)"),
    ],
)
def test_an_egress_policy_in_one_line(mode: str, networks: list[str], domains: list[str], said: str) -> None:
    assert show_egress(policy(mode, networks, domains)) == said


def test_a_network_entry_by_entry() -> None:
    usage = NetworkUsage(received_bytes=2048, sent_bytes=3, received_packets=4, sent_packets=5, refused_packets=6)
    whole = SandboxNetwork(
        policy=policy("list", ["10.1.0.0/16"], ["github.com"]), in_force=False, connected=False,
        not_connected_reason="no way out", address="10.64.0.2", gateway="10.64.0.1", usage=usage,
    )  # fmt: skip
    assert describe_network(whole) == [
        ("egress", "list"),
        ("allowed", "github.com"),
        ("", "10.1.0.0/16"),
        ("limits", ""),
        ("address", "10.64.0.2"),
        ("gateway", "10.64.0.1"),
        ("connected", "no: no way out"),
        ("in force", "not yet: it is tried again until it is"),
        ("received", "2.0 KiB in 4 packets"),
        ("sent", "3 B in 5 packets"),
        ("refused", "6 packets"),
    ]
