"""API keys in all their forms, the audit log, the rates, and requests that are sent twice."""

from __future__ import annotations

import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tests.api.people import add_person
from tests.running_manager import RunningManager, start_manager, stop_manager, wait_until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from atelier.model.errors import RateLimitedError
from atelier.services.rate_limits import Limits, RateLimits


def whoami(manager: RunningManager, **headers: str) -> httpx.Response:
    return httpx.get(
        f"{manager.url}/api/v1/whoami",
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        verify=False,
    )


def test_a_key_in_every_form(manager: RunningManager) -> None:
    person = add_person(manager, "ann")
    secret = person.key.removeprefix("atl_")
    for headers in (
        {"Authorization": f"Bearer {person.key}"},
        {"Authorization": f"Bearer e2b_{secret}"},
        {"X_API_Key": f"e2b_{secret}"},
        {"X_API_Key": person.key},
    ):
        answer = whoami(manager, **headers)
        assert answer.json()["user_id"] == person.user_id, headers
    for wrong in (f"e2b_{secret.upper()}", f"e2b_{secret}0", f"e2b_{secret[:-1]}", "atl_", "e2b_", "a b"):
        assert whoami(manager, X_API_Key=wrong).status_code == 401, wrong
    raw = (manager.data_dir / "atelier.db").read_bytes() + (manager.data_dir / "atelier.db-wal").read_bytes()
    assert secret.encode() not in raw


def test_keys_expire_and_are_revoked(manager: RunningManager) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=3)
    person = add_person(manager, "ben", expires_at=soon.isoformat())
    with person.client() as client:
        keys = client.get("/api/v1/api-keys").json()["items"]
        assert [each["hint"] for each in keys] == [person.key[-4:]]
        other = client.post("/api/v1/api-keys", json={"name": "other"}).json()
        assert wait_until(lambda: client.get("/api/v1/whoami").status_code == 401)
        assert client.get("/api/v1/whoami").json()["code"] == "key_expired"
    assert whoami(manager, X_API_Key=other["key"]).status_code == 200
    wait_until(
        lambda: any(each["last_used_at"] for each in list_keys(manager, other["key"]) if each["id"] == other["id"])
    )
    stranger = add_person(manager, "cid")
    with stranger.client() as client:
        assert client.delete(f"/api/v1/api-keys/{other['id']}").status_code == 404
        assert client.get("/api/v1/api-keys?all=true").json()["code"] == "admin_only"
        assert client.post("/api/v1/api-keys", json={"name": "x", "user": person.email}).json()["code"] == "admin_only"
    with manager.client() as admin:
        assert admin.delete(f"/api/v1/api-keys/{other['id']}").status_code == 204
        local = next(each for each in admin.get("/api/v1/api-keys").json()["items"] if each["is_local"])
        assert admin.delete(f"/api/v1/api-keys/{local['id']}").json()["code"] == "local_key"
    assert whoami(manager, X_API_Key=other["key"]).json()["code"] == "unauthenticated"


def list_keys(manager: RunningManager, key: str) -> list[dict[str, str]]:
    answer = httpx.get(f"{manager.url}/api/v1/api-keys", headers={"X-API-Key": key}, verify=False)
    return answer.json()["items"]


def test_scopes_narrow_a_key(manager: RunningManager) -> None:
    person = add_person(manager, "dot", scopes=["read"])
    with person.client() as client:
        assert client.get("/api/v1/sandboxes").status_code == 200
        assert client.post("/api/v1/sandboxes", json={}).json()["code"] == "scope_missing"
        assert client.post("/api/v1/api-keys", json={"name": "more"}).json()["code"] == "scope_missing"
    with manager.client() as admin:
        narrow = admin.post("/api/v1/api-keys", json={"name": "narrow", "scopes": ["read", "account"]}).json()["key"]
        made = admin.post("/api/v1/sandboxes?wait=true", json={}).json()["id"]
    headers = {"X-API-Key": narrow}
    wider = httpx.post(
        f"{manager.url}/api/v1/api-keys", json={"name": "x", "scopes": ["write"]}, headers=headers, verify=False
    )
    assert wider.json()["code"] == "scope_missing"
    # Without the scope an admin is shown what a member is shown: their own.
    with add_person(manager, "fay").client() as client:
        foreign = client.post("/api/v1/sandboxes?wait=true", json={}).json()["id"]
    listed = httpx.get(f"{manager.url}/api/v1/sandboxes?limit=500", headers=headers, verify=False).json()["items"]
    ids = [each["id"] for each in listed]
    assert made in ids
    assert foreign not in ids
    with manager.client() as admin:
        for sandbox in (made, foreign):
            admin.delete(f"/api/v1/sandboxes/{sandbox}?wait=true")


def test_the_audit_log_says_who_what_and_from_where(manager: RunningManager) -> None:
    person = add_person(manager, "gus")
    with person.client() as client:
        sandbox = client.post("/api/v1/sandboxes?wait=true", json={}).json()["id"]
        client.get(f"/api/v1/sandboxes/{sandbox}")
        client.post(f"/api/v1/sandboxes/{sandbox}/run", json={"command": ["true"]})
        client.post("/api/v1/host/shutdown", json={})
        client.delete(f"/api/v1/sandboxes/{sandbox}?wait=true")
        key_id = client.get("/api/v1/whoami").json()["key_id"]
    with manager.client() as admin:
        first = admin.get("/api/v1/audit", params={"user": person.user_id, "limit": 2}).json()
        rest = admin.get("/api/v1/audit", params={"user": person.user_id, "before": first["next_before"]}).json()
    entries = first["items"] + rest["items"]
    assert [(each["operation"], each["subject"], each["status"]) for each in entries] == [
        ("destroy_sandbox", sandbox, 204),
        ("shut_down", "", 403),
        ("run_process", sandbox, 200),
        ("create_sandbox", sandbox, 201),
    ]
    assert {(each["user_name"], each["through"], each["address"]) for each in entries} == {
        ("gus", f"key {key_id}", "127.0.0.1")
    }


def test_a_body_without_a_length_is_counted(manager: RunningManager) -> None:
    def pieces() -> object:
        for _ in range(40):
            yield b" " * 1024 * 1024

    with manager.client() as client:
        answer = client.post("/api/v1/sandboxes", content=pieces(), headers={"Content-Type": "application/json"})  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_a_request_that_is_sent_twice_is_done_once(manager: RunningManager) -> None:
    person, other = add_person(manager, "hal"), add_person(manager, "ida")
    key = {"Idempotency-Key": "once"}
    with person.client() as client, ThreadPoolExecutor(8) as threads:

        def create(body: dict[str, object]) -> httpx.Response:
            return client.post("/api/v1/sandboxes?wait=true", json=body, headers=key)

        answers = list(threads.map(create, [{"labels": {"a": "b"}}] * 8))
        assert {each.status_code for each in answers} == {201}
        (sandbox,) = {each.json()["id"] for each in answers}
        assert [each["id"] for each in client.get("/api/v1/sandboxes").json()["items"]] == [sandbox]
        different = create({"labels": {"a": "c"}})
        assert (different.status_code, different.json()["code"]) == (422, "idempotency_key_reused")
        # Somebody else's key is another one.
        with other.client() as another:
            own = another.post("/api/v1/sandboxes?wait=true", json={}, headers=key).json()["id"]
            assert own != sandbox
            another.delete(f"/api/v1/sandboxes/{own}?wait=true")
        # What failed may be tried again.
        failing = {"Idempotency-Key": "fails"}
        for _ in range(2):
            answer = client.post("/api/v1/sandboxes", json={"image": "none"}, headers=failing)
            assert answer.json()["code"] == "image_not_found"
        assert client.post("/api/v1/sandboxes?wait=true", json={}, headers=failing).status_code == 201
        # Of a sandbox, and of many at once.
        path = f"/api/v1/sandboxes/{sandbox}"
        taken = {
            client.post(f"{path}/snapshots?wait=true", headers={"Idempotency-Key": "s"}).json()["id"] for _ in "12"
        }
        assert len(taken) == 1
        forks = [
            client.post(f"{path}/fork?wait=true", json={"count": 2}, headers={"Idempotency-Key": "f"}).json()["items"]
            for _ in "12"
        ]
        assert [each["id"] for each in forks[0]] == [each["id"] for each in forks[1]]
        assert len(client.get("/api/v1/sandboxes").json()["items"]) == 4
        for each in client.get("/api/v1/sandboxes").json()["items"]:
            client.delete(f"/api/v1/sandboxes/{each['id']}?wait=true")


def test_rates_and_numbers_are_limited() -> None:
    variables = {
        "ATELIER_REQUESTS_PER_SECOND": "5",
        "ATELIER_SIGN_INS_PER_MINUTE": "2",
        "ATELIER_WEB_SOCKETS_PER_KEY": "1",
    }
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        manager = start_manager(Path(folder), variables=variables)
        try:
            with manager.client() as client:
                sandbox = client.post("/api/v1/sandboxes?wait=true", json={}).json()["id"]
                url = f"{manager.url}/api/v1/sandboxes/{sandbox}/pty?command=cat".replace("http", "ws")
                headers = {"Authorization": f"Bearer {manager.key}"}
                with connect(url, additional_headers=headers), pytest.raises(InvalidStatus) as refused:
                    connect(url, additional_headers=headers)
                assert refused.value.response.status_code == 429
                # Those who look at a terminal that lives on count with them.
                terminals = f"/api/v1/sandboxes/{sandbox}/terminals"
                terminal = client.post(terminals, json={"command": ["cat"]}).json()["id"]
                attached = f"{manager.url}{terminals}/{terminal}/attach".replace("http", "ws")
                with connect(attached, additional_headers=headers) as viewer:
                    assert "joined" in str(viewer.recv(timeout=20))
                    for another in (attached, url):
                        with pytest.raises(InvalidStatus) as refused:
                            connect(another, additional_headers=headers)
                        assert refused.value.response.status_code == 429
                        assert b"too_many_web_sockets" in bytes(refused.value.response.body or b"")
                    assert client.get(terminals).json()["items"][0]["viewers"] == 1

                def come_back() -> bool:
                    try:
                        with connect(attached, additional_headers=headers) as viewer:
                            return "joined" in str(viewer.recv(timeout=20))
                    except InvalidStatus:
                        return False

                assert wait_until(come_back), "who has gone counts no more"
                answers = [client.get("/api/v1/whoami") for _ in range(200)]
                limited = [each for each in answers if each.status_code == 429]
                assert limited
                assert limited[0].json()["code"] == "rate_limited"
                assert int(limited[0].headers["Retry-After"]) >= 1
                assert wait_until(lambda: client.get("/api/v1/whoami").status_code == 200)
            signs = [
                httpx.post(f"{manager.url}/sign-in/first-run", headers={"Origin": manager.url}, verify=False)
                for _ in "123"
            ]
            assert [each.status_code for each in signs] == [401, 401, 429]
            assert int(signs[-1].headers["Retry-After"]) >= 1
        finally:
            stop_manager(manager)


def test_buckets_fill_again() -> None:
    now = 0.0
    limits = RateLimits(Limits(2, 0, 0), lambda: now)
    for _ in range(4):
        limits.take_request("a")
    with pytest.raises(RateLimitedError) as refused:
        limits.take_request("a")
    assert refused.value.retry_after_seconds == pytest.approx(0.5)
    limits.take_request("b")
    now += 0.5
    limits.take_request("a")
    with pytest.raises(RateLimitedError):
        limits.take_request("a")
    for _ in range(1000):
        limits.take_sign_in("nobody is limited by 0")


def test_what_was_made_before_there_were_users_is_the_first_admins() -> None:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        manager = start_manager(Path(folder))
        with manager.client() as client:
            admin = client.get("/api/v1/whoami").json()["user_id"]
        stop_manager(manager)
        with sqlite3.connect(manager.data_dir / "atelier.db") as database:
            (owner,) = database.execute("SELECT id FROM users").fetchone()
            assert owner == admin
        manager = start_manager(Path(folder))
        try:
            with manager.client() as client:
                assert client.get("/api/v1/whoami").json()["user_id"] == admin, "the same, start after start"
        finally:
            stop_manager(manager)
