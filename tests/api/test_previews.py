"""Previews through the real gateway: who may enter, and what those are shown who may not, or not now."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import pytest
from tests.api.people import Person, add_person
from tests.preview_stage import Browser, PreviewStage, echo_request
from tests.running_manager import wait_until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from atelier import AsyncSandbox, Sandbox


@pytest.fixture(scope="module")
def owner(stage: PreviewStage) -> Person:
    return add_person(stage.manager, "owner")


@pytest.fixture(scope="module")
def box(stage: PreviewStage, owner: Person) -> str:
    return stage.create(owner.client(), name="box")


def preview(stage: PreviewStage, sandbox: str, port: int = 8000) -> str:
    """Its URL, whoever may visit it."""
    items = stage.call("PUT", f"/sandboxes/{sandbox}/ports/{port}", {"visibility": "private"})
    return items["url"]


def signed_in(stage: PreviewStage) -> Browser:
    """The admin's browser."""
    link = stage.call("POST", "/first-run-link", expected=201)["url"]
    secret = link.partition("secret=")[2]
    browser = Browser()
    origin = {"Origin": stage.manager.url}
    answer = browser.ask("POST", f"{stage.manager.url}/sign-in/first-run", data={"secret": secret}, headers=origin)
    assert answer.status_code == 303, answer.text
    return browser


def visiting(stage: PreviewStage, person: Person, sandbox: str, port: int = 8000) -> Browser:
    """A browser that has entered as that person."""
    browser = Browser()
    with person.client() as client:
        made = client.post(f"/api/v1/sandboxes/{sandbox}/ports/{port}/visits", json={"path": "/entered"})
    assert made.status_code == 201, made.text
    answer = browser.follow(made.json()["url"])
    assert answer.json()["line"] == "GET /entered HTTP/1.1"
    return browser


def test_a_public_port_is_everybodys(stage: PreviewStage, box: str) -> None:
    url = stage.share(box, 8000)
    answer = Browser().ask("POST", f"{url}/a/b?c=d", content=b"body")
    assert answer.status_code == 200, answer.text
    assert answer.json()["line"] == "POST /a/b?c=d HTTP/1.1"
    assert answer.json()["body"] == "body"


def test_a_private_port_by_the_managers_session(stage: PreviewStage, box: str) -> None:
    url = preview(stage, box)
    browser = signed_in(stage)
    sent_away = browser.ask("GET", f"{url}/page?x=1")
    assert sent_away.status_code == 303
    assert sent_away.headers["location"].startswith(
        f"{stage.manager.url}/previews/enter?host=8000-{box}.atelier.localhost"
    )
    arrived = browser.follow(f"{url}/page?x=1")
    assert arrived.json()["line"] == "GET /page?x=1 HTTP/1.1"
    assert "atelier" not in str(arrived.json()["headers"]).lower().replace("atelier.localhost", "")
    assert browser.ask("GET", f"{url}/again").status_code == 200
    # A session that is over ends what it has opened.
    browser.ask("POST", f"{stage.manager.url}/sign-out", headers={"Origin": stage.manager.url})
    wait_until(lambda: browser.ask("GET", f"{url}/again").status_code == 303, 20)


def test_who_signs_in_on_the_way_comes_back_to_the_preview(stage: PreviewStage, box: str) -> None:
    url = preview(stage, box)
    browser = Browser()
    page = browser.follow(f"{url}/deep?x=1")
    assert page.status_code == 200
    assert "Sign in to Atelier" in page.text
    secret = stage.call("POST", "/first-run-link", expected=201)["url"].partition("secret=")[2]
    welcome = browser.ask(
        "POST",
        f"{stage.manager.url}/sign-in/first-run",
        data={"secret": secret},
        headers={"Origin": stage.manager.url},
    )
    assert welcome.headers["location"].startswith("/previews/enter?host=")
    arrived = browser.follow(stage.manager.url + welcome.headers["location"])
    assert arrived.json()["line"] == "GET /deep?x=1 HTTP/1.1"


def test_a_code_is_good_once_and_for_its_host_only(stage: PreviewStage, owner: Person, box: str) -> None:
    preview(stage, box)
    other = stage.create(owner.client())
    with owner.client() as client:
        url = client.post(f"/api/v1/sandboxes/{box}/ports/8000/visits", json={}).json()["url"]
        second = client.post(f"/api/v1/sandboxes/{box}/ports/8000/visits", json={}).json()["url"]
    elsewhere = Browser().ask("GET", second.replace(box, other))
    assert (elsewhere.status_code, "code_used" in elsewhere.text) == (403, True)
    assert Browser().ask("GET", second).status_code == 403, "whoever tried it has used it up"
    first = Browser()
    assert first.follow(url).status_code == 200
    assert Browser().ask("GET", url).status_code == 403
    # The cookie is the host's: carried elsewhere it opens nothing.
    cookie = next(iter(first.cookies.values()))
    stolen = Browser()
    for to in (preview(stage, other), preview(stage, box, 8001)):
        stolen.cookies[urlsplit(to).netloc] = cookie
        assert stolen.ask("GET", to).status_code == 303


def test_strangers_the_shared_with_and_keys(stage: PreviewStage, owner: Person, box: str) -> None:
    url = preview(stage, box)
    stranger, shared = add_person(stage.manager, "stranger"), add_person(stage.manager, "shared")
    reader = add_person(stage.manager, "reader", scopes=["read"])
    with owner.client() as client:
        for person in (shared, reader):
            assert client.post(f"/api/v1/sandboxes/{box}/shares", json={"user": person.email}).status_code == 200
    browser = Browser()
    said = {
        name: browser.ask("GET", url, headers={"X-Atelier-Key": key, "Accept": "application/json"})
        for name, key in (
            ("owner", owner.key), ("shared", shared.key), ("admin", stage.manager.key), ("stranger", stranger.key),
            ("reader", reader.key), ("nonsense", "atl_nonsense"),
        )
    }  # fmt: skip
    assert {name: answer.status_code for name, answer in said.items()} == {
        "owner": 200, "shared": 200, "admin": 200, "stranger": 403, "reader": 403, "nonsense": 401,
    }  # fmt: skip
    assert said["stranger"].json()["code"] == "access_denied"
    assert "x-atelier-key" not in str(said["owner"].json()["headers"]).lower()
    nobody = browser.ask("GET", url, headers={"Accept": "application/json"})
    assert (nobody.status_code, nobody.json()["code"]) == (401, "unauthenticated")
    # No more shared with, no more let in; and a removed user's cookie and key are worth nothing.
    inside = visiting(stage, shared, box)
    with owner.client() as client:
        client.delete(f"/api/v1/sandboxes/{box}/shares/{shared.email}")
    wait_until(lambda: inside.ask("GET", url).status_code == 403, 20)
    stage.call("PATCH", f"/users/{shared.user_id}", {"is_disabled": True})
    refused = browser.ask("GET", url, headers={"X-Atelier-Key": shared.key})
    assert (refused.status_code, "user_disabled" in refused.text) == (401, True)
    assert inside.ask("GET", url).status_code == 303


def test_links_until_they_expire_are_forged_or_taken_back(stage: PreviewStage, box: str) -> None:
    url = preview(stage, box)
    link = stage.call("POST", f"/sandboxes/{box}/ports/8000/links", {"expires_in_seconds": 3600}, 201)["url"]
    assert stage.call("GET", f"/sandboxes/{box}/ports")["items"][0]["visibility"] == "link"
    guest = Browser()
    assert guest.follow(link).json()["line"] == "GET / HTTP/1.1"
    assert guest.ask("GET", f"{url}/more").status_code == 200
    for forged in (
        link[:-1] + ("A" if link[-1] != "A" else "B"),
        link.replace("link=", "link=x"),
        link + "%00",
        link[:-40],
    ):
        assert Browser().ask("GET", forged).status_code == 403, forged
    # The cookie's value is no link, nor the other way.
    cookie = next(iter(guest.cookies[urlsplit(url).netloc].values()))
    assert Browser().ask("GET", f"{url}/.atelier/enter?link={cookie}").status_code == 403
    short = stage.call("POST", f"/sandboxes/{box}/ports/8000/links", {"expires_in_seconds": 1}, 201)["url"]
    wait_until(lambda: Browser().ask("GET", short).status_code == 403, 20)
    preview(stage, box)  # private again
    wait_until(lambda: guest.ask("GET", f"{url}/more").status_code == 303, 20)
    assert Browser().ask("GET", link).status_code == 403
    stage.call("POST", f"/sandboxes/{box}/ports/8000/links", {}, 201)
    assert Browser().ask("GET", link).status_code == 403, "what was taken back does not come back with another link"


def test_pages_of_other_sites_do_nothing_with_the_cookie(stage: PreviewStage, owner: Person, box: str) -> None:
    url = preview(stage, box)
    sibling = preview(stage, stage.create(owner.client()))
    browser = visiting(stage, owner, box)
    for origin in (sibling, "https://evil.example", "null", url.replace("http:", "https:"), f"{url}.evil.example"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            refused = browser.ask(method, url, headers={"Origin": origin})
            assert (refused.status_code, "wrong_origin" in refused.text) == (403, True), (method, origin)
    assert browser.ask("POST", url).status_code == 403, "a browser says where a form comes from"
    assert browser.ask("POST", url, headers={"Origin": url}).status_code == 200
    host, _, port = urlsplit(url).netloc.rpartition(":")
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies[f"{host}:{port}"].items())
    for origin in (sibling, "https://evil.example", None):
        with pytest.raises(InvalidStatus) as refused_socket:
            connect(
                f"ws://127.0.0.1:{port}/",
                origin=origin,
                additional_headers={"Cookie": cookie, "Host": f"{host}:{port}"},
            )
        assert refused_socket.value.response.status_code in (400, 403), origin


def test_hosts_that_are_none(stage: PreviewStage, box: str) -> None:
    url = stage.share(box, 8000)
    port = urlsplit(url).port
    browser = Browser()
    for name in (
        f"0-{box}", f"70000-{box}", f"65536-{box}", f"99999999-{box}", f"-{box}", f"8000-{box}.x", f"8000_{box}", box,
        "8000-nothere", f"8000-{'a' * 300}", "8000-", f"telnet-{box}", f"08000-{box}", "8000-a.b", "8000--",
        f"8000-{box}'\"<script>", "xn--8000-" + box,
    ):  # fmt: skip
        answer = browser.ask("GET", url, headers={"Host": f"{name}.atelier.localhost:{port}"})
        assert answer.status_code == 404, (name, answer.status_code)
        assert "There is no such sandbox" in answer.text
        assert "<script>" not in answer.text
    for host in (
        "atelier.localhost",
        "127.0.0.1",
        f"8000-{box}.atelier.localhost.",
        f"8000-{box}.evil.example",
        "[::1]",
    ):
        assert browser.ask("GET", url, headers={"Host": host}).status_code == 404, host
    unicode = stage.raw(url, "GET / HTTP/1.1\r\nHost: 8000-ä.atelier.localhost\r\n\r\n".encode(), until=b"</html>")
    assert unicode.startswith(b"HTTP/1.1 404 ")
    as_json = browser.ask("GET", url, headers={"Host": "8000-x.atelier.localhost", "Accept": "application/json"})
    assert as_json.json()["code"] == "no_such_sandbox"
    by_name = browser.ask("GET", url, headers={"Host": f"8000-BOX.atelier.localhost:{port}"})
    assert by_name.status_code == 200, "names are as good as ids, in any case of letters"


def test_tools_have_names(stage: PreviewStage, box: str) -> None:
    stage.channels.servers[8080] = echo_request
    assert stage.share(box, 8080).startswith(f"http://vscode-{box}.")
    url = stage.call("PUT", f"/sandboxes/{box}/ports/vscode", {"visibility": "public"})["url"]
    assert Browser().ask("GET", url).status_code == 200
    assert Browser().ask("GET", url.replace("vscode-", "8080-")).status_code == 200
    for wrong in ("0", "70000", "nothing", "-1", "1e3"):
        assert (
            stage.call("PUT", f"/sandboxes/{box}/ports/{wrong}", {"visibility": "public"}, 422)["code"]
            == "invalid_port"
        )


def test_a_port_on_which_nothing_listens(stage: PreviewStage, box: str) -> None:
    url = stage.share(box, 9)
    answer = Browser().ask("GET", url)
    assert (answer.status_code, "Nothing listens on port 9" in answer.text) == (502, True)
    as_json = Browser().ask("GET", url, headers={"Accept": "application/json"})
    assert (as_json.status_code, as_json.json()["code"]) == (502, "port_closed")


def test_a_stopped_sandbox_has_a_button_and_a_paused_one_wakes(stage: PreviewStage, owner: Person) -> None:
    sandbox = stage.create(owner.client(), name="sleeper")
    url = preview(stage, sandbox)
    browser = visiting(stage, owner, sandbox)
    stage.call("POST", f"/sandboxes/{sandbox}/pause?wait=true")

    def is_awake() -> bool:
        assert browser.ask("GET", url).status_code == 200
        return stage.call("GET", f"/sandboxes/{sandbox}")["state"] == "running"

    wait_until(is_awake, 20)
    stage.call("POST", f"/sandboxes/{sandbox}/stop?wait=true")
    wait_until(lambda: browser.ask("GET", f"{url}/x?y=1").status_code == 503, 20)
    page = browser.ask("GET", f"{url}/x?y=1")
    assert "sleeper is stopped" in page.text
    action = re.search(r'<form method="post" action="([^"]+)">', page.text)
    assert action is not None
    for headers in ({}, {"Origin": "https://evil.example"}, {"Origin": stage.manager.url}):
        assert browser.ask("POST", url + action[1], headers=headers).status_code == 403, headers
    assert Browser().ask("POST", url + action[1], headers={"Origin": url}).status_code == 403, "nobody known"
    assert stage.call("GET", f"/sandboxes/{sandbox}")["state"] == "stopped"
    started = browser.ask("POST", url + action[1], headers={"Origin": url})
    assert (started.status_code, started.headers["location"]) == (303, "/x?y=1")
    wait_until(lambda: browser.ask("GET", f"{url}/x?y=1").status_code == 200, 20)
    # Somebody who came by a link, or to what is public, sees no button.
    stage.share(sandbox, 8000)
    stage.call("POST", f"/sandboxes/{sandbox}/stop?wait=true")
    anybody = Browser()
    wait_until(lambda: anybody.ask("GET", url).status_code == 503, 20)
    assert "<form" not in anybody.ask("GET", url).text
    stage.call("DELETE", f"/sandboxes/{sandbox}?wait=true", expected=204)
    assert anybody.ask("GET", url).status_code == 404


def test_only_owners_share_and_only_where_one_may(stage: PreviewStage, owner: Person, box: str) -> None:
    shared = add_person(stage.manager, "friend")
    with owner.client() as client:
        client.post(f"/api/v1/sandboxes/{box}/shares", json={"user": shared.email})
    with shared.client() as client:
        put = client.put(f"/api/v1/sandboxes/{box}/ports/8000", json={"visibility": "public"})
        assert (put.status_code, put.json()["code"]) == (403, "not_owner")
        assert client.post(f"/api/v1/sandboxes/{box}/ports/8000/links", json={}).json()["code"] == "not_owner"
        assert client.get(f"/api/v1/sandboxes/{box}/ports").status_code == 200


def test_a_way_on_that_leads_elsewhere_leads_home(stage: PreviewStage, owner: Person, box: str) -> None:
    preview(stage, box)
    for path in (
        "//evil.example",
        "/\\evil.example",
        "https://evil.example",
        "/a\r\nSet-Cookie: x=y",
        "",
        "javascript:x",
    ):
        with owner.client() as client:
            url = client.post(f"/api/v1/sandboxes/{box}/ports/8000/visits", json={"path": path}).json()["url"]
        answer = Browser().ask("GET", url)
        assert (answer.status_code, answer.headers["location"]) == (303, "/"), path
        assert "x" not in answer.headers.get_list("set-cookie")[0].partition("=")[0]


def test_listening_ports_are_listed(stage: PreviewStage, owner: Person) -> None:
    sandbox = stage.create(owner.client())
    with (
        owner.client() as client,
        client.stream(
            "POST",
            f"/api/v1/sandboxes/{sandbox}/exec",
            json={"command": ["python3", "-m", "http.server", "8123"]},
        ) as running,
    ):
        next(running.iter_lines())
        stage.share(sandbox, 4096)
        items = stage.call("GET", f"/sandboxes/{sandbox}/ports")["items"]
        assert [(each["port"], each["tool"], each["is_open"], each["visibility"]) for each in items] == [
            (4096, "agent", False, "public"),
            (8123, None, True, "private"),
        ]
        assert items[1]["url"].startswith(f"http://8123-{sandbox}.atelier.localhost:")


def test_what_the_manager_said_is_good_while_it_restarts(stage: PreviewStage, box: str) -> None:
    url = stage.share(box, 8000)
    browser = Browser()
    assert browser.ask("GET", url).status_code == 200
    socket = stage.run.manager_socket
    away = socket.with_name("away.sock")
    socket.rename(away)
    try:
        time.sleep(2.5)  # until what was said has to be asked again
        assert browser.ask("GET", url).status_code == 200
        unknown = browser.ask("GET", url, headers={"Cookie": "atelier-preview=x"})
        assert (unknown.status_code, "being restarted" in unknown.text) == (503, True)
    finally:
        away.rename(socket)


def test_entering_is_written_down(stage: PreviewStage, owner: Person, box: str) -> None:
    preview(stage, box)
    visiting(stage, owner, box)
    entries = stage.call("GET", "/audit?operation=enter_preview")["items"]
    assert (entries[0]["user_id"], entries[0]["subject"]) == (owner.user_id, f"{box}/8000")


def test_what_everybody_may_ask_the_page_of_hand_over(stage: PreviewStage, box: str) -> None:
    browser = signed_in(stage)
    for host in ("", "evil.example", f"8000-{box}.evil.example", "8000-nothere.atelier.localhost", "x" * 299):
        answer = browser.ask("GET", f"{stage.manager.url}/previews/enter?host={host}&next=/")
        assert answer.status_code == 403, host
    with httpx.Client(base_url=stage.manager.url) as nobody:
        assert nobody.get("/previews/enter", params={"host": "x" * 1000}).status_code == 422


def test_the_command_line_and_the_sdk(stage: PreviewStage, owner: Person) -> None:
    box = stage.create(owner.client())
    preview(stage, box)
    key = {"ATELIER_API_URL": stage.manager.url, "ATELIER_API_KEY": owner.key}

    def atelier(*words: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "atelier.cli", *words]
        done = subprocess.run(command, env={**os.environ, **key}, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        return done.stdout

    url = atelier("open", box, "8000").strip()
    assert url == f"http://8000-{box}.atelier.localhost:{urlsplit(url).port}/"
    link = atelier("port-share", box, "8000", "--link", "--days", "1").strip()
    assert Browser().follow(link).status_code == 200
    assert "link" in atelier("ports", box)
    assert atelier("port-share", box, "8000", "--public").strip() == url.rstrip("/")
    assert Browser().ask("GET", url).status_code == 200
    assert json.loads(atelier("port-share", box, "8000", "--private", "--json"))["visibility"] == "private"
    assert json.loads(atelier("ports", box, "--json")) == []
    atelier("port-share", box, "8000", status=2)
    atelier("open", box, "70000", status=1)
    handle = Sandbox.connect(box, api_url=stage.manager.url, api_key=owner.key)
    with handle.preview_client(8000) as client:
        assert client.post("/from/sdk", content=b"x").json()["line"] == "POST /from/sdk HTTP/1.1"
    assert handle.preview_url("vscode").startswith(f"http://vscode-{box}.")
    assert handle.ports() == []
    handle.close()

    async def asynchronously() -> int:
        other = await AsyncSandbox.connect(box, api_url=stage.manager.url, api_key=owner.key)
        async with await other.preview_client(8000) as client:
            status = (await client.get("/")).status_code
        await other.close()
        return status

    assert asyncio.run(asynchronously()) == 200
