"""Sandboxes over the API: create, list, show, destroy, and every kind of bad input."""

from __future__ import annotations

import json
import re

import httpx
import pytest

SANDBOXES = "/api/v1/sandboxes"


def assert_error(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"code", "message", "hint"}
    assert body["code"] == code
    assert body["message"]


def test_create_get_list_destroy(api: httpx.Client) -> None:
    created = api.post(SANDBOXES, params={"wait": True}, json={"name": "first-one", "labels": {"team": "web"}})
    assert created.status_code == 201, created.text
    body = created.json()
    assert body["state"] == "running"
    assert re.fullmatch(r"[a-z2-7]{12}", body["id"])
    assert (body["vcpu_count"], body["memory_mib"], body["disk_mib"]) == (1, 512, 4096)
    for reference in (body["id"], "first-one"):
        assert api.get(f"{SANDBOXES}/{reference}").json() == body
    assert [row["id"] for row in api.get(SANDBOXES).json()["items"]] == [body["id"]]
    assert api.get(SANDBOXES, params={"label": "team=web"}).json()["items"]
    assert api.get(SANDBOXES, params={"label": "team=db"}).json()["items"] == []
    assert api.get(SANDBOXES, params={"state": "failed"}).json()["items"] == []
    assert api.delete(f"{SANDBOXES}/first-one", params={"wait": True}).status_code == 204
    assert_error(api.get(f"{SANDBOXES}/{body['id']}"), 404, "sandbox_not_found")
    assert_error(api.delete(f"{SANDBOXES}/first-one"), 404, "sandbox_not_found")


def test_create_without_wait_answers_at_once(api: httpx.Client) -> None:
    answer = api.post(SANDBOXES, json={})
    assert answer.status_code == 202
    assert answer.json()["state"] in ("creating", "running")
    assert api.delete(f"{SANDBOXES}/{answer.json()['id']}", params={"wait": True}).status_code == 204


def test_pages_cover_everything_once(api: httpx.Client) -> None:
    made = {api.post(SANDBOXES, params={"wait": True}, json={}).json()["id"] for _ in range(7)}
    seen: list[str] = []
    cursor = ""
    while True:
        page = api.get(SANDBOXES, params={"limit": 3, "cursor": cursor}).json()
        seen += [row["id"] for row in page["items"]]
        cursor = page["next_cursor"]
        if not cursor:
            break
    assert len(seen) == len(set(seen)) == 7
    assert set(seen) == made
    assert_error(api.get(SANDBOXES, params={"cursor": "nonsense"}), 422, "invalid_cursor")


def test_name_is_unique(api: httpx.Client) -> None:
    assert api.post(SANDBOXES, params={"wait": True}, json={"name": "twice"}).status_code == 201
    assert_error(api.post(SANDBOXES, json={"name": "twice"}), 409, "name_taken")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"image": "no-such"}, 404, "image_not_found"),
        ({"name": "a/b"}, 422, "invalid_name"),
        ({"name": "x" * 300}, 422, "invalid_name"),
        ({"name": "Upper"}, 422, "invalid_name"),
        ({"name": ""}, 422, "invalid_name"),
        ({"name": "abcdefghijkl"}, 422, "invalid_name"),
        ({"vcpu_count": 0}, 422, "invalid_request"),
        ({"vcpu_count": 9999}, 422, "invalid_request"),
        ({"memory_mib": 1048576}, 503, "insufficient_capacity"),
        ({"memory_mib": -1}, 422, "invalid_request"),
        ({"disk_mib": 1}, 422, "invalid_request"),
        ({"unknown": 1}, 422, "invalid_request"),
        ({"environment": {"A=B": "x"}}, 422, "invalid_request"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    api: httpx.Client, body: dict[str, object], status: int, code: str
) -> None:
    assert_error(api.post(SANDBOXES, params={"wait": True}, json=body), status, code)
    assert api.get(SANDBOXES).json()["items"] == []


def test_body_that_is_no_json(api: httpx.Client) -> None:
    answer = api.post(SANDBOXES, content=b"{", headers={"Content-Type": "application/json"})
    assert_error(answer, 422, "invalid_request")


def test_unknown_route_and_method(api: httpx.Client) -> None:
    assert_error(api.get("/api/v1/nothing"), 404, "not_found")
    assert_error(api.put(SANDBOXES), 405, "method_not_allowed")


def test_images_and_metrics(api: httpx.Client, sandbox: str) -> None:
    assert "base" in api.get("/api/v1/images").json()["recipes"]
    metrics = api.get(f"{SANDBOXES}/{sandbox}/metrics").json()
    assert metrics["cpu_count"] >= 1
    lines = [json.loads(line) for line in api.post("/api/v1/images/base/build", json={}).text.splitlines()]
    assert lines[-1]["type"] == "built"
    assert lines[-1]["image"]["name"] == "base"
    assert_error(api.post("/api/v1/images/no-such/build", json={}), 404, "image_not_found")
    assert api.get(f"{SANDBOXES}/{sandbox}/console").status_code == 200
