"""Allowing and denying entries: what becomes of a policy, and what is refused."""

from __future__ import annotations

import pytest

from atelier.model.errors import AtelierError, InvalidRequestError, NotFoundError
from atelier.model.network_policy import MAX_ENTRIES, EgressMode, EgressPolicy
from atelier.model.network_policy_edit import edit_egress, split_entries

ALL = EgressPolicy()
NONE = EgressPolicy(EgressMode.NONE)


def listed(*entries: str) -> EgressPolicy:
    networks, domains = split_entries(entries)
    return EgressPolicy.make(EgressMode.LIST, networks, domains)


def said(egress: EgressPolicy) -> tuple[str, ...]:
    return (egress.mode.value, *map(str, egress.networks), *egress.domains)


@pytest.mark.parametrize(
    ("entry", "is_network"),
    [
        *(
            (entry, True)
            for entry in ("10.0.0.0/8", "203.0.113.7", " 10.0.0.0/8 ", "999.1.1.1", "10.0.0.0/33", "", "1")
        ),
        *((entry, True) for entry in ("fe80::1", "2001:db8::/32", "::")),
        *(
            (entry, False)
            for entry in ("github.com", "*.github.com", "github.com:443", "https://github.com", "a.com/x")
        ),
        *(
            (entry, False)
            for entry in (
                "\u0663.\u0663.\u0663.\u0663",
                "münchen.de",
                "x" * 300,
                "10.0.0.0-10.0.0.9",
                "1.com",
                "fe80:1",
            )
        ),
    ],
)
def test_networks_and_domains_are_told_apart_by_their_form(entry: str, is_network: bool) -> None:
    assert split_entries([entry]) == (([entry], []) if is_network else ([], [entry]))


def test_what_is_allowed_while_nothing_is_makes_a_list() -> None:
    assert said(edit_egress(NONE, allow=["github.com", "10.1.0.0/16"])) == ("list", "10.1.0.0/16", "github.com")


def test_a_list_grows_and_merges() -> None:
    grown = edit_egress(listed("10.0.0.0/25", "a.com"), allow=["10.0.0.128/25", "A.com.", "*.b.com", "10.0.0.7"])
    assert said(grown) == ("list", "10.0.0.0/24", "*.b.com", "a.com")


def test_in_mode_all_a_network_is_listed_beside_the_internet() -> None:
    opened = edit_egress(ALL, allow=["10.1.0.0/16"])
    assert said(opened) == ("all", "10.1.0.0/16")
    assert said(edit_egress(opened, deny=["10.1.0.0/16"])) == ("all",)


def test_in_mode_all_a_domain_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        edit_egress(ALL, allow=["10.1.0.0/16", "github.com"])
    assert "github.com is allowed already" in refused.value.message
    assert "mode list first" in refused.value.hint


def test_a_domain_and_the_mode_list_in_one_piece() -> None:
    assert said(edit_egress(ALL, mode=EgressMode.LIST, allow=["github.com"])) == ("list", "github.com")


@pytest.mark.parametrize(
    ("mode", "left"),
    [
        (EgressMode.ALL, ("all", "10.1.0.0/16")),
        (EgressMode.LIST, ("list", "10.1.0.0/16", "github.com")),
        (EgressMode.NONE, ("none",)),
    ],
)
def test_another_mode(mode: EgressMode, left: tuple[str, ...]) -> None:
    """What was opened stays open in the wider mode, and nothing stays in none."""
    assert said(edit_egress(listed("10.1.0.0/16", "github.com"), mode=mode)) == left


def test_nothing_and_something_at_once_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="allows nothing"):
        edit_egress(ALL, mode=EgressMode.NONE, allow=["github.com"])


def test_the_last_entry_leaves_an_empty_list() -> None:
    assert said(edit_egress(listed("github.com"), deny=[" GitHub.com."])) == ("list",)


@pytest.mark.parametrize(
    ("present", "denied", "said", "hint"),
    [
        (listed("github.com", "10.1.0.0/16"), "gitlab.com", "listed: 10.1.0.0/16, github.com", "only what is listed"),
        (listed("*.github.com"), "api.github.com", "listed: *.github.com", "only what is listed"),
        (listed("10.0.0.0/24"), "10.0.0.0/25", "10.0.0.0/25 cannot be denied", "it is a part of 10.0.0.0/24"),
        (listed(*(f"10.{number}.0.1" for number in range(50))), "a.com", "and 40 more", "only what is listed"),
        (NONE, "a.com", "listed: nothing", "only what is listed"),
        (ALL, "203.0.113.0/24", "listed: nothing", "change to the mode list"),
        (ALL, "github.com", "listed: nothing", "change to the mode list"),
    ],
)
def test_what_is_not_listed_cannot_be_denied(present: EgressPolicy, denied: str, said: str, hint: str) -> None:
    with pytest.raises(NotFoundError) as refused:
        edit_egress(present, deny=[denied])
    assert refused.value.code == "egress_entry_not_found"
    assert said in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize("way", ["allow", "deny"])
@pytest.mark.parametrize(
    ("entry", "code"),
    [("10.0.0.1/8", "invalid_network"), ("a.*.com", "invalid_domain"), ("fe80::1", "invalid_network")],
)
def test_what_is_malformed_is_named(way: str, entry: str, code: str) -> None:
    with pytest.raises(AtelierError) as refused:
        edit_egress(listed("a.com"), **{way: [entry]})
    assert refused.value.code == code
    assert entry in refused.value.message


def test_a_list_has_its_bounds() -> None:
    full = listed(*(f"n{number}.example.com" for number in range(MAX_ENTRIES)))
    with pytest.raises(InvalidRequestError) as refused:
        edit_egress(full, allow=["one.more.com"])
    assert refused.value.code == "invalid_egress_policy"
    assert said(edit_egress(full, deny=["n0.example.com"], allow=["one.more.com"]))[0] == "list"
