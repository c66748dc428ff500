"""A sandbox's network over the API, and the figures for monitoring, with a network that fails when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from atelier.db.outbox import Outbox
from atelier.manager.network_process import NetworkHolderProcess
from atelier.manager.wiring import Drivers, choose_drivers
from atelier.model.errors import HostError
from atelier.model.machine import GuestAddress, NetworkAttachment
from atelier.model.network_policy import CLOSED_POLICY, MAX_ENTRIES, OPEN_POLICY, NetworkPolicy, NetworkUsage
from atelier.services import networks

from . import manager_inside
from .manager_inside import ManagerInside, open_manager_inside
from .test_sandbox_routes import SANDBOXES, assert_error

NETWORK = f"{SANDBOXES}/box/network"
OPEN = {"mode": "all", "networks": [], "domains": []}


async def create(inside: ManagerInside, **body: Any) -> httpx.Response:
    return await inside.client.post(SANDBOXES, params={"wait": True}, json={"name": "box", **body})


@pytest.fixture
async def box(inside: ManagerInside) -> str:
    """Id of a running sandbox called ``box``, that reaches what it likes."""
    answer = await create(inside)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def egress(mode: str, networks: list[str] | None = None, domains: list[str] | None = None) -> dict[str, Any]:
    return {"egress": {"mode": mode, "networks": networks or [], "domains": domains or []}}


async def policy(inside: ManagerInside) -> dict[str, Any]:
    answer = await inside.client.get(NETWORK)
    assert answer.status_code == 200, answer.text
    return answer.json()["policy"]


# -- showing and setting -------------------------------------------------------------------------------------------


async def test_a_sandbox_of_which_nothing_was_said_has_the_internet(inside: ManagerInside, box: str) -> None:
    answer = await inside.client.get(NETWORK)
    assert answer.json() == {
        "policy": {"egress": OPEN, "download_kbit_per_second": None, "upload_kbit_per_second": None},
        "in_force": True,
        "connected": True,
        "not_connected_reason": None,
        "address": None,
        "gateway": None,
        "usage": {
            "received_bytes": 0,
            "sent_bytes": 0,
            "received_packets": 0,
            "sent_packets": 0,
            "refused_packets": 0,
        },
    }
    assert (await inside.client.get(f"{SANDBOXES}/{box}/network")).json() == answer.json()


async def test_the_policy_of_a_creation(inside: ManagerInside) -> None:
    wish = {
        **egress("list", ["10.0.0.128/25", "10.0.0.0/25"], ["B.com.", "*.a.com", "b.com"]),
        "upload_kbit_per_second": 64,
    }
    created = await create(inside, network=wish)
    assert created.status_code == 201, created.text
    shown = await policy(inside)
    assert shown["egress"] == {"mode": "list", "networks": ["10.0.0.0/24"], "domains": ["*.a.com", "b.com"]}
    assert (shown["download_kbit_per_second"], shown["upload_kbit_per_second"]) == (None, 64)
    assert inside.network.policies[created.json()["id"]] == NetworkPolicy.from_json(shown)


async def test_put_replaces_the_whole(inside: ManagerInside, box: str) -> None:
    first = {**egress("list", domains=["github.com"]), "download_kbit_per_second": 1000}
    assert (await inside.client.put(NETWORK, json=first)).json()["policy"]["download_kbit_per_second"] == 1000
    answer = await inside.client.put(NETWORK, json=egress("none"))
    assert answer.status_code == 200
    assert answer.json()["policy"] == {
        **egress("none"),
        "download_kbit_per_second": None,
        "upload_kbit_per_second": None,
    }
    assert inside.network.policies[box] == NetworkPolicy.from_json(answer.json()["policy"])


async def test_patch_edits(inside: ManagerInside, box: str) -> None:
    async def patch(**body: Any) -> dict[str, Any]:
        answer = await inside.client.patch(NETWORK, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["policy"]

    assert (await patch(allow=["10.1.0.0/16"]))["egress"] == {**OPEN, "networks": ["10.1.0.0/16"]}
    assert (await patch(egress_mode="none"))["egress"] == {**OPEN, "mode": "none"}
    grown = await patch(allow=["github.com", "203.0.113.7"])
    assert grown["egress"] == {"mode": "list", "networks": ["203.0.113.7/32"], "domains": ["github.com"]}
    limited = await patch(download_kbit_per_second=5000, upload_kbit_per_second=100)
    assert limited["egress"] == grown["egress"]
    lifted = await patch(upload_kbit_per_second=None, deny=["203.0.113.7"])
    assert (lifted["download_kbit_per_second"], lifted["upload_kbit_per_second"]) == (5000, None)
    assert lifted["egress"] == {"mode": "list", "networks": [], "domains": ["github.com"]}
    assert await patch() == lifted
    assert inside.network.policies[box] == NetworkPolicy.from_json(lifted)


async def test_two_patches_at_once_lose_nothing(inside: ManagerInside, box: str) -> None:
    await inside.client.put(NETWORK, json=egress("none"))
    names = [f"n{number}.example.com" for number in range(20)]
    answers = await asyncio.gather(*(inside.client.patch(NETWORK, json={"allow": [name]}) for name in names))
    assert {answer.status_code for answer in answers} == {200}
    assert (await policy(inside))["egress"]["domains"] == sorted(names)


async def test_the_event_says_what_has_changed(inside: ManagerInside, box: str) -> None:
    await inside.client.patch(NETWORK, json={"egress_mode": "list", "allow": ["github.com"]})
    database = inside.installation.fleet._database
    with database.read() as connection:
        kinds = {event.kind: event for event in Outbox(database).read_after(connection, 0, 1000)}
    changed = kinds["sandbox.network_changed"]
    assert changed.sandbox_id == box
    assert (changed.payload["egress_mode"], changed.payload["domains"]) == ("list", 1)


async def test_addresses_and_usage_are_shown(inside: ManagerInside, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = GuestAddress("10.64.0.2", 16, "10.64.0.1", "10.64.0.1")

    async def ensure_slot(sandbox_id: str, lease: int, policy: NetworkPolicy) -> NetworkAttachment:
        return NetworkAttachment("tap", "02:00:00:00:00:01", guest)

    monkeypatch.setattr(inside.network, "ensure_slot", ensure_slot)
    created = (await create(inside)).json()

    async def read_usage() -> dict[str, NetworkUsage]:
        return {created["id"]: NetworkUsage(1, 2, 3, 4, 5)}

    monkeypatch.setattr(inside.network, "read_usage", read_usage)
    shown = (await inside.client.get(NETWORK)).json()
    assert (shown["address"], shown["gateway"]) == ("10.64.0.2", "10.64.0.1")
    assert list(shown["usage"].values()) == [1, 2, 3, 4, 5]


# -- bad input -----------------------------------------------------------------------------------------------------

BAD_ENTRIES = [
    ("networks", "10.0.0.1/8", "invalid_network", "'10.0.0.1/8'"),
    ("networks", "10.0.0.0/33", "invalid_network", "'10.0.0.0/33'"),
    ("networks", "10.0.0", "invalid_network", "'10.0.0'"),
    ("networks", "", "invalid_network", "''"),
    ("networks", "example.com", "invalid_network", "'example.com'"),
    ("networks", "2001:db8::/32", "invalid_network", "IPv6"),
    ("networks", "169.254.169.254", "invalid_network", "169.254.0.0/16"),
    ("networks", "9" * 300, "invalid_network", "9…"),
    ("networks", "\u0661\u0660.0.0.0/8", "invalid_network", "\u0661\u0660"),
    ("networks", "\x1b[31m10.0.0.0/8", "invalid_network", "\\x1b"),
    ("domains", "*", "invalid_domain", "'*'"),
    ("domains", "a.*.example.com", "invalid_domain", "'*' may only stand"),
    ("domains", "*example.com", "invalid_domain", "'*' may only stand"),
    ("domains", "example.*", "invalid_domain", "'*' may only stand"),
    ("domains", "*.*.example.com", "invalid_domain", "'*' may only stand"),
    ("domains", "*.com", "invalid_domain", "'*.com'"),
    ("domains", "münchen.de", "invalid_domain", "xn--"),
    ("domains", "x" * 300, "invalid_domain", "x…"),
    ("domains", "x." * 150 + "com", "invalid_domain", "…"),
    ("domains", "exa mple.com", "invalid_domain", "exa mple.com"),
    ("domains", "https://example.com", "invalid_domain", "https"),
    ("domains", "10.1.2.3", "invalid_domain", "is it an address?"),
    ("domains", "a\x00b.com", "invalid_domain", "\\x00"),
]


@pytest.fixture
def open_box(api: httpx.Client) -> None:
    """As ``box``, in the manager that the tests of this folder share."""
    assert api.post(SANDBOXES, params={"wait": True}, json={"name": "box"}).status_code == 201


def create_other(api: httpx.Client, network: Any) -> httpx.Response:
    return api.post(SANDBOXES, json={"name": "other", "network": network})


def shown_egress(api: httpx.Client) -> dict[str, Any]:
    return api.get(NETWORK).json()["policy"]["egress"]


@pytest.mark.parametrize(("kind", "entry", "code", "said"), BAD_ENTRIES)
def test_what_is_malformed_is_named_and_nothing_changes(
    api: httpx.Client, open_box: None, kind: str, entry: str, code: str, said: str
) -> None:
    wish = egress("list", **{kind: ["203.0.113.0/24" if kind == "networks" else "good.com", entry]})
    answers = [api.put(NETWORK, json=wish), create_other(api, wish)]
    if code == "invalid_domain" and entry != "10.1.2.3":
        answers.append(api.patch(NETWORK, json={"egress_mode": "list", "allow": [entry]}))
    for answer in answers:
        assert_error(answer, 422, code)
        body = answer.json()
        assert said in f"{body['message']} {body['hint']}"
        assert len(body["message"]) < 300
    assert shown_egress(api) == OPEN
    assert api.get(f"{SANDBOXES}/other").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"egress": None},
        {"egress": {}},
        {"egress": {"mode": "some"}},
        {"egress": {"mode": "ALL"}},
        {"egress": {"mode": "list", "networks": "10.0.0.0/8"}},
        {"egress": {"mode": "list", "domains": [1]}},
        {"egress": {"mode": "list", "domains": ["x" * 1001]}},
        {"egress": {"mode": "list", "domains": ["a.com"] * (10 * MAX_ENTRIES + 1)}},
        {"egress": {"mode": "all", "ports": [80]}},
        {**egress("all"), "download_kbit_per_second": 63},
        {**egress("all"), "download_kbit_per_second": 10**9},
        {**egress("all"), "upload_kbit_per_second": "fast"},
        {**egress("all"), "upload_kbit_per_second": -1},
        {**egress("all"), "rate": 1},
        [],
        "open",
    ],
    ids=lambda body: str(body)[:60],
)
def test_what_is_no_policy(api: httpx.Client, open_box: None, body: Any) -> None:
    assert_error(api.put(NETWORK, json=body), 422, "invalid_request")
    if isinstance(body, dict) and body:
        assert_error(create_other(api, body), 422, "invalid_request")
    assert shown_egress(api) == OPEN


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (egress("none", ["10.0.0.0/8"]), "takes no networks"),
        (egress("none", domains=["a.com"]), "takes no networks and no domains"),
        (egress("all", domains=["a.com"]), "takes no domains"),
        (egress("list", domains=[f"n{number}.com" for number in range(MAX_ENTRIES + 1)]), "1001 networks and domains"),
        (
            egress("list", [f"10.{number // 250}.{number % 250}.0/24" for number in range(5000)], ["a.com"]),
            "5001 networks and domains: a sandbox may have 1000",
        ),
    ],
    ids=["none with networks", "none with domains", "all with domains", "one too many", "thousands"],
)
def test_what_does_not_go_together(api: httpx.Client, open_box: None, wish: dict[str, Any], said: str) -> None:
    answer = api.put(NETWORK, json=wish)
    assert_error(answer, 422, "invalid_egress_policy")
    assert said in answer.json()["message"]
    assert answer.json()["hint"]


async def test_a_thousand_entries_are_taken(inside: ManagerInside, box: str) -> None:
    names = [f"n{number:03}.example.com" for number in range(MAX_ENTRIES)]
    answer = await inside.client.put(NETWORK, json=egress("list", domains=names))
    assert answer.status_code == 200
    assert answer.json()["policy"]["egress"]["domains"] == names
    one_more = await inside.client.patch(NETWORK, json={"allow": ["one.more.com"]})
    assert_error(one_more, 422, "invalid_egress_policy")


async def test_patches_that_are_refused_say_what_to_do(inside: ManagerInside, box: str) -> None:
    answer = await inside.client.patch(NETWORK, json={"allow": ["github.com"]})
    assert_error(answer, 422, "invalid_egress_policy")
    assert "mode list first" in answer.json()["hint"]
    answer = await inside.client.patch(NETWORK, json={"deny": ["203.0.113.0/24"]})
    assert_error(answer, 404, "egress_entry_not_found")
    assert "mode list" in answer.json()["hint"]
    await inside.client.put(NETWORK, json=egress("list", ["10.0.0.0/24"], ["github.com"]))
    answer = await inside.client.patch(NETWORK, json={"deny": ["github.com", "gitlab.com"]})
    assert_error(answer, 404, "egress_entry_not_found")
    assert "10.0.0.0/24" in answer.json()["message"]
    assert (await policy(inside))["egress"]["domains"] == ["github.com"], "all of it or nothing"
    for body in ({"mode": "all"}, {"egress_mode": "open"}, {"allow": "github.com"}, {"download_kbit_per_second": 1}):
        assert_error(await inside.client.patch(NETWORK, json=body), 422, "invalid_request")


async def test_a_sandbox_that_is_not_there(inside: ManagerInside) -> None:
    path = f"{SANDBOXES}/absent/network"
    for answer in (
        await inside.client.get(path),
        await inside.client.put(path, json=egress("none")),
        await inside.client.patch(path, json={"allow": ["github.com"]}),
    ):
        assert_error(answer, 404, "sandbox_not_found")


async def test_a_sandbox_that_is_being_destroyed(inside: ManagerInside, box: str) -> None:
    inside.storage.faults.hang("ensure_volume_absent")
    await inside.client.delete(f"{SANDBOXES}/box")
    assert_error(await inside.client.put(NETWORK, json=egress("none")), 409, "invalid_state")
    assert_error(await inside.client.patch(NETWORK, json={"egress_mode": "none"}), 409, "invalid_state")
    assert (await inside.client.get(NETWORK)).status_code == 200
    inside.storage.faults.release("ensure_volume_absent")


# -- where the network fails or is not there -----------------------------------------------------------------------


async def test_what_is_stored_and_not_in_force_is_said_and_mended(inside: ManagerInside, box: str) -> None:
    inside.network.faults.fail_next("set_policy", HostError("nft says no"))
    answer = await inside.client.put(NETWORK, json=egress("none"))
    assert_error(answer, 503, "network_policy_pending")
    assert "stored and not yet in force: nft says no" in answer.json()["message"]
    shown = (await inside.client.get(NETWORK)).json()
    assert shown["policy"]["egress"]["mode"] == "none"
    # The manager's own loop brings it into force.
    async with asyncio.timeout(20):
        while not (await inside.client.get(NETWORK)).json()["in_force"]:
            await asyncio.sleep(0.05)
    assert inside.network.policies[box].egress.mode == "none"


async def test_usage_that_cannot_be_read_is_left_out(inside: ManagerInside, box: str) -> None:
    inside.network.faults.fail_next("read_usage")
    shown = await inside.client.get(NETWORK)
    assert (shown.status_code, shown.json()["usage"]) == (200, None)


async def test_where_there_is_no_way_out(inside: ManagerInside, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(inside.network), "enforces_policies", False)
    shown = (await inside.client.get(NETWORK)).json()
    assert shown["connected"] is False
    assert "atelier doctor" in shown["not_connected_reason"]
    wish = egress("list", domains=["github.com"])
    for answer in (
        await inside.client.put(NETWORK, json=wish),
        await inside.client.patch(NETWORK, json={"upload_kbit_per_second": 100}),
        await create(inside, name="other", network=wish),
    ):
        assert_error(answer, 409, "network_closed")
        assert "atelier doctor" in answer.json()["hint"]
    for wish in (egress("none"), egress("all")):
        assert (await inside.client.put(NETWORK, json=wish)).status_code == 200


async def test_a_network_holder_that_was_started_anew_gets_all_policies_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Holder:
        """As the manager keeps it."""

        on_started_anew: Callable[[], None]

        async def open(self) -> None: ...

        async def release(self) -> None: ...

        async def close(self) -> None: ...

    holder = Holder()

    async def choose(*arguments: Any) -> Drivers:
        return replace(await choose_drivers(*arguments), network_holder=cast(NetworkHolderProcess, holder))

    monkeypatch.setattr(manager_inside, "choose_drivers", choose)
    async with open_manager_inside(tmp_path, monkeypatch) as inside:
        box = (await create(inside, network=egress("none"))).json()["id"]
        inside.network.policies[box] = OPEN_POLICY
        holder.on_started_anew()
        async with asyncio.timeout(20):
            while not (await inside.client.get(NETWORK)).json()["in_force"]:
                await asyncio.sleep(0.05)
        assert inside.network.policies[box] == CLOSED_POLICY


# -- monitoring ----------------------------------------------------------------------------------------------------


async def scrape(inside: ManagerInside) -> dict[tuple[str, str], float]:
    """(sample, label's value) -> value."""
    answer = await inside.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {(sample.name, next(iter(sample.labels.values()), "")): sample.value for sample in samples}


async def test_figures_for_monitoring(inside: ManagerInside, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read_usage() -> dict[str, NetworkUsage]:
        return {box: NetworkUsage(2**40, 2, 3, 4, 5)}

    monkeypatch.setattr(inside.network, "read_usage", read_usage)
    found = await scrape(inside)
    assert found["atelier_sandboxes", "running"] == 1
    assert found["atelier_sandboxes", "failed"] == 0
    words = ("received_bytes", "sent_bytes", "received_packets", "sent_packets", "refused_packets")
    values = [found[f"atelier_sandbox_network_{word}_total", box] for word in words]
    assert values == [2**40, 2, 3, 4, 5]
    assert found["atelier_network_scrape_errors_total", ""] == 0


async def test_a_network_that_fails_costs_its_own_figures_only(inside: ManagerInside, box: str) -> None:
    inside.network.faults.fail_next("read_usage", times=2)
    for errors in (1, 2):
        found = await scrape(inside)
        assert found["atelier_sandboxes", "running"] == 1
        assert not [name for name, _ in found if name.startswith("atelier_sandbox_network")]
        assert found["atelier_network_scrape_errors_total", ""] == errors
    found = await scrape(inside)
    assert found["atelier_sandbox_network_sent_bytes_total", box] == 0
    assert found["atelier_network_scrape_errors_total", ""] == 2


async def test_a_network_that_hangs_does_not_hold_the_scrape(
    inside: ManagerInside, box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "_USAGE_SECONDS", 0.05)
    inside.network.faults.hang("read_usage")
    found = await scrape(inside)
    assert found["atelier_sandboxes", "running"] == 1
    assert found["atelier_network_scrape_errors_total", ""] == 1
    inside.network.faults.release("read_usage")


async def test_figures_want_the_key(inside: ManagerInside) -> None:
    answer = await inside.client.get("/metrics", headers={"Authorization": "Bearer wrong"})
    assert_error(answer, 401, "unauthenticated")
