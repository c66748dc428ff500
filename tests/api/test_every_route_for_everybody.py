"""Every route of the OpenAPI document and every WebSocket, asked by nobody, a stranger, the owner, somebody with whom the
sandbox is shared, and an admin; what each is answered follows from the one table of rights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import Depends
from fastapi.routing import APIRoute, APIWebSocketRoute, iter_route_contexts
from tests.api.people import Person, add_person
from tests.running_manager import RunningManager
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from atelier.api import preview_pages, sign_in_pages, terminal_page
from atelier.api.application import describe_api
from atelier.api.authorisation import RULES, Right, authorise

ADMINS_ONLY = {
    "add_user", "build_image", "change_user", "create_first_run_link", "drain_warm_pool", "list_audit_entries",
    "list_orphans", "list_users", "list_warm_pools", "remove_orphan", "scrape_metrics", "set_warm_pool",
    "shut_down",
}  # fmt: skip
OWNERS_ONLY = {
    "delete_snapshot", "destroy_sandbox", "make_preview_link", "set_port_visibility", "share_sandbox",
    "unshare_sandbox",
}  # fmt: skip
BODIES = {"shut_down": {"sandboxes": "nonsense"}}
"""Where an empty body would end the test."""
NAMES = ("nobody", "stranger", "shared", "owner", "admin")
"""Who may least comes first: what they do must leave something for the others."""


def routes() -> dict[str, list[Any]]:
    """What is called before each route, by its operation."""
    app = describe_api()
    app.include_router(sign_in_pages.router)
    app.include_router(preview_pages.router)
    app.include_router(terminal_page.router, dependencies=[Depends(authorise)])
    found: dict[str, list[Any]] = {}
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        if isinstance(route, APIRoute | APIWebSocketRoute):
            found[operation_of(route)] = [each.call for each in context.dependant.dependencies]
    return found


def operation_of(route: APIRoute | APIWebSocketRoute) -> str:
    return (isinstance(route, APIRoute) and route.operation_id) or route.name


def test_every_route_has_a_rule_and_is_held_to_it() -> None:
    assert set(routes()) == set(RULES)
    free = {operation for operation, called_before in routes().items() if authorise not in called_before}
    assert free == {operation for operation, rule in RULES.items() if rule.right is Right.OPEN}


def test_what_is_for_admins_and_owners() -> None:
    assert {name for name, rule in RULES.items() if rule.right is Right.ADMIN} == ADMINS_ONLY
    assert {name for name, rule in RULES.items() if rule.owner_only} == OWNERS_ONLY
    documented = {
        operation["operationId"]
        for operations in describe_api().openapi()["paths"].values()
        for operation in operations.values()
    }
    pages = {
        operation_of(route)
        for router in (sign_in_pages.router, preview_pages.router, terminal_page.router)
        for route in router.routes
        if isinstance(route, APIRoute)
    }
    assert set(RULES) == documented | pages | {"open_terminal", "attach_terminal_session"}


def expected(operation: str, who: str, path: str) -> tuple[int, str] | None:
    """(status, code) of the refusal; None: they are let through to whatever the route then answers."""
    rule = RULES[operation]
    if rule.right is Right.OPEN:
        return None
    if who == "nobody":
        return 401, "unauthenticated"
    if who == "admin":
        return None
    if rule.right is Right.ADMIN:
        return 403, "admin_only"
    for kind in ("sandbox", "snapshot"):
        if f"{{{kind}}}" in path:
            if who == "stranger":
                return 404, f"{kind}_not_found"
            if who == "shared" and rule.owner_only:
                return 403, "not_owner"
    return None


class Stage:
    """A sandbox of the owner's with a snapshot, shared with one of the others."""

    def __init__(self, manager: RunningManager) -> None:
        self.manager = manager
        self.owner = add_person(manager, "owner")
        self.shared = add_person(manager, "shared")
        self.stranger = add_person(manager, "stranger")
        self.people: dict[str, Person | None] = {
            "nobody": None,
            "stranger": self.stranger,
            "shared": self.shared,
            "owner": self.owner,
            "admin": Person("", "", manager.key, manager.url),
        }

    def make(self) -> tuple[str, str]:
        """(id of a running sandbox, id of a snapshot of it)."""
        with self.owner.client() as client:
            sandbox = client.post("/api/v1/sandboxes?wait=true", json={})
            assert sandbox.status_code == 201, sandbox.text
            name = sandbox.json()["id"]
            snapshot = client.post(f"/api/v1/sandboxes/{name}/snapshots?wait=true")
            assert snapshot.status_code == 201, snapshot.text
            share = client.post(f"/api/v1/sandboxes/{name}/shares", json={"user": self.shared.email})
            assert share.status_code == 200, share.text
        return name, snapshot.json()["id"]


@pytest.fixture(scope="module")
def stage(manager: RunningManager) -> Iterator[Stage]:
    yield Stage(manager)
    with manager.client() as admin:
        for each in admin.get("/api/v1/sandboxes", params={"limit": 500}).json()["items"]:
            admin.delete(f"/api/v1/sandboxes/{each['id']}", params={"wait": True})


def ask(person: Person | None, url: str, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
    """(status, code of the error). Streams are left at once."""
    headers = {"Authorization": f"Bearer {person.key}"} if person else {}
    with (
        httpx.Client(base_url=url, headers=headers, timeout=30, verify=False) as client,
        client.stream(method, path, json=body, params={"path": "x"}) as answer,
    ):
        if answer.status_code < 400:
            return answer.status_code, ""
        answer.read()
        return answer.status_code, answer.json().get("code", "")


def test_every_route_for_everybody(stage: Stage) -> None:
    document = httpx.get(f"{stage.manager.url}/openapi.json", verify=False).json()
    sandbox, snapshot = stage.make()
    asked: list[tuple[str, str]] = []
    wrong: list[str] = []
    operations = [
        (method, path, operation["operationId"])
        for path, by_method in document["paths"].items()
        for method, operation in by_method.items()
    ]
    # What destroys comes last, and finds something to destroy each time.
    operations.sort(key=lambda each: each[2] in OWNERS_ONLY)
    for method, path, operation in operations:
        for who in NAMES:
            if operation in OWNERS_ONLY:
                sandbox, snapshot = stage.make()
            names = {"sandbox": sandbox, "snapshot": snapshot, "pid": "1", "name": "base", "image": "base"}
            filled = path
            for part in (
                "sandbox",
                "snapshot",
                "pid",
                "name",
                "image",
                "port",
                "orphan",
                "kind",
                "user",
                "key",
                "session",
                "terminal",
            ):
                filled = filled.replace(f"{{{part}}}", names.get(part, "none"))
            assert "{" not in filled, path
            body = BODIES.get(operation, {}) if method in ("post", "put", "patch") else None
            status, code = ask(stage.people[who], stage.manager.url, method.upper(), filled, body)
            due = expected(operation, who, path)
            asked.append((operation, who))
            is_let_through = status not in (401, 403, 500) and code not in ("sandbox_not_found", "snapshot_not_found")
            if (due is not None and (status, code) != due) or (due is None and not is_let_through):
                wrong.append(f"{operation} by {who}: {status} {code}, not {due or 'let through'}")
    assert not wrong, "\n".join(wrong)
    assert len(asked) == len(set(asked)) == len(NAMES) * len(operations) > 300


@pytest.mark.parametrize(
    ("operation", "tail", "first"),
    [("open_terminal", "pty", '"started"'), ("attach_terminal_session", "terminals/{}/attach", '"joined"')],
)
def test_the_terminal_for_everybody(stage: Stage, operation: str, tail: str, first: str) -> None:
    sandbox, _ = stage.make()
    with stage.owner.client() as client:
        terminal = client.post(f"/api/v1/sandboxes/{sandbox}/terminals", json={"command": ["cat"]}).json()["id"]
    path = f"/api/v1/sandboxes/{sandbox}/{tail.format(terminal)}"
    for who in NAMES:
        person = stage.people[who]
        headers = {"Authorization": f"Bearer {person.key}"} if person else {}
        due = expected(operation, who, f"/api/v1/sandboxes/{{sandbox}}/{tail}")
        url = stage.manager.url.replace("http", "ws") + path
        if due is None:
            with connect(url, additional_headers=headers) as socket:
                assert first in str(socket.recv(timeout=20)), who
        else:
            with pytest.raises(InvalidStatus) as refused:
                connect(url, additional_headers=headers)
            assert refused.value.response.status_code == due[0], who
            assert due[1].encode() in bytes(refused.value.response.body or b"")


def test_the_terminals_page_for_everybody(stage: Stage) -> None:
    sandbox, _ = stage.make()
    for operation, path in (
        ("show_terminal_page", f"/sandboxes/{sandbox}/terminal"),
        ("get_terminal_asset", "/terminal-assets/terminal.js"),
    ):
        for who in NAMES:
            due = expected(operation, who, path.replace(sandbox, "{sandbox}"))
            status, code = ask(stage.people[who], stage.manager.url, "GET", path, None)
            assert (status, code) in ((due,) if due else ((200, ""), (503, "missing_package"))), (operation, who)


def test_lists_show_what_one_may_see(stage: Stage) -> None:
    sandbox, snapshot = stage.make()
    seen: dict[str, tuple[bool, bool]] = {}
    for who in NAMES[1:]:
        person = stage.people[who]
        assert person is not None
        with person.client() as client:
            listed = [each["id"] for each in client.get("/api/v1/sandboxes?limit=500").json()["items"]]
            saved = [each["id"] for each in client.get("/api/v1/snapshots").json()["items"]]
            by_name = client.get("/api/v1/snapshots", params={"sandbox": sandbox}).json()["items"]
        seen[who] = (sandbox in listed, snapshot in saved)
        assert bool(by_name) is (snapshot in saved)
    everything, nothing = (True, True), (False, False)
    assert seen == {"stranger": nothing, "shared": everything, "owner": everything, "admin": everything}


def test_a_snapshot_of_somebody_else_begins_nothing(stage: Stage) -> None:
    _, snapshot = stage.make()
    with stage.stranger.client() as client:
        refused = client.post("/api/v1/sandboxes", json={"snapshot": snapshot})
        assert (refused.status_code, refused.json()["code"]) == (404, "snapshot_not_found")
    with stage.shared.client() as client:
        begun = client.post("/api/v1/sandboxes?wait=true", json={"snapshot": snapshot})
        assert begun.status_code == 201, begun.text
        # Whose it is, who has begun it: it is not shared with anybody.
        own = begun.json()["id"]
    with stage.owner.client() as client:
        assert client.get(f"/api/v1/sandboxes/{own}").status_code == 404


def test_events_tell_of_what_one_may_see(stage: Stage) -> None:
    def read(person: Person, until: str) -> set[str | None]:
        """Whose events there are, from the first that is kept to the one of ``until``."""
        found: set[str | None] = set()
        with (
            person.client() as client,
            client.stream("GET", "/api/v1/events", headers={"Last-Event-ID": "0"}) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    found.add(event["sandbox_id"])
                    if (
                        event["sandbox_id"] == until
                        and event["kind"] == "sandbox.state_changed"
                        and event["payload"]["state"] == "running"
                    ):
                        return found
        raise AssertionError("the stream has ended")

    sandbox, _ = stage.make()
    with stage.stranger.client() as client:
        own = client.post("/api/v1/sandboxes?wait=true", json={}).json()["id"]
    seen = read(stage.stranger, own)
    assert own in seen
    assert sandbox not in seen
    assert sandbox in read(stage.shared, sandbox)
    assert own not in read(stage.shared, sandbox)
    with stage.manager.client() as client:
        assert client.delete(f"/api/v1/sandboxes/{own}?wait=true").status_code == 204
