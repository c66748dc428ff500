"""Signing in: the first-run link, and a real OpenID Connect provider with everything that can be wrong; what a session's
cookie opens, and from where."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from tests.api.identity_provider import Provider, identity_provider
from tests.running_manager import RunningManager, start_manager, stop_manager
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

COOKIE = "atelier_session"


@dataclass
class Stage:
    manager: RunningManager
    provider: Provider

    def browser(self) -> httpx.Client:
        return httpx.Client(base_url=self.manager.url, headers={"Origin": self.manager.url}, timeout=30, verify=False)

    def begin(self, browser: httpx.Client) -> str:
        """Where the browser is sent to."""
        answer = browser.post("/sign-in/oidc")
        assert answer.status_code == 303, answer.text
        return answer.headers["location"]

    def agree(self, url: str, who: str) -> str:
        """What somebody does at the provider; where that sends the browser back to."""
        answer = httpx.post(url, data={"sub": who}, verify=False)
        assert answer.status_code == 302, answer.text
        return answer.headers["location"]

    def sign_in(self, who: str) -> tuple[httpx.Client, httpx.Response]:
        browser = self.browser()
        return browser, browser.get(self.agree(self.begin(browser), who))


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder, identity_provider() as provider:
        variables = {
            "ATELIER_OIDC_ISSUER": provider.issuer,
            "ATELIER_OIDC_CLIENT_ID": "atelier",
            "ATELIER_OIDC_CLIENT_SECRET": "secret",
            "ATELIER_OIDC_TITLE": "Example",
            "ATELIER_SIGN_IN_DOMAINS": "example.org",
            "ATELIER_SIGN_INS_PER_MINUTE": "0",
        }
        manager = start_manager(Path(folder), variables=variables)
        try:
            yield Stage(manager, provider)
        finally:
            assert "Traceback" not in manager.log.read_text()
            stop_manager(manager)


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert f"<code>{code}</code>" in answer.text
    assert COOKIE not in answer.headers.get("set-cookie", "")


def test_the_first_run_link_makes_one_session(stage: Stage) -> None:
    found = re.search(r"http\S+/sign-in/first-run\?secret=(\S+)", stage.manager.log.read_text())
    assert found is not None
    with stage.browser() as browser:
        assert browser.get(found[0]).status_code == 200
        assert browser.get(found[0]).status_code == 200, "looking does not use it up"
        refused(browser.post("/sign-in/first-run", data={"secret": "wrong"}), 401, "first_run_link_invalid")
        foreign = httpx.post(f"{stage.manager.url}/sign-in/first-run", data={"secret": found[1]}, verify=False)
        refused(foreign, 403, "wrong_origin")
        assert browser.post("/sign-in/first-run", data={"secret": found[1]}).status_code == 303
        who = browser.get("/api/v1/whoami").json()
        assert (who["name"], who["role"], who["key_id"]) == ("local admin", "admin", "")
        refused(browser.post("/sign-in/first-run", data={"secret": found[1]}), 409, "first_run_over")
    assert found[1] not in stage.manager.data_dir.joinpath("atelier.db").read_bytes().decode("latin-1")


def test_a_person_of_the_domain_becomes_a_member(stage: Stage) -> None:
    browser, answer = stage.sign_in("ada")
    assert answer.status_code == 303, answer.text
    cookie = answer.headers.get_list("set-cookie")[0]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    who = browser.get("/api/v1/whoami").json()
    assert (who["name"], who["role"]) == ("Ada", "member")
    again, _ = stage.sign_in("ada")
    assert again.get("/api/v1/whoami").json()["user_id"] == who["user_id"]


@pytest.mark.parametrize("who", ["bob", "eve", "ada-too"])
def test_who_is_not_admitted(stage: Stage, who: str) -> None:
    """An address that is not verified; a foreign domain; somebody else who now has a known person's address."""
    stage.sign_in("ada")
    browser, answer = stage.sign_in(who)
    refused(answer, 403, "not_admitted")
    assert browser.get("/api/v1/whoami").status_code == 401


def test_whom_an_admin_has_added_may_enter(stage: Stage) -> None:
    with stage.manager.client() as admin:
        added = admin.post("/api/v1/users", json={"email": "Eve@Elsewhere.example", "role": "admin"})
        assert added.status_code == 201, added.text
        browser, answer = stage.sign_in("eve")
        assert answer.status_code == 303, answer.text
        assert browser.get("/api/v1/whoami").json()["role"] == "admin"
        over = admin.post("/api/v1/first-run-link")
        assert (over.status_code, over.json()["code"]) == (409, "first_run_over")
        assert admin.patch("/api/v1/users/eve@elsewhere.example", json={"is_disabled": True}).status_code == 200
        assert browser.get("/api/v1/whoami").status_code == 401
        _, answer = stage.sign_in("eve")
        refused(answer, 401, "user_disabled")


def test_state_code_and_browser_must_be_those_of_the_attempt(stage: Stage) -> None:
    browser, other = stage.browser(), stage.browser()
    back = stage.agree(stage.begin(browser), "ada")
    sent = {name: values[0] for name, values in parse_qs(urlsplit(back).query).items()}
    callback = "/sign-in/oidc/callback"
    refused(browser.get(callback, params={**sent, "state": "wrong"}), 401, "sign_in_expired")
    assert browser.get(back).status_code == 303
    refused(browser.get(back), 401, "sign_in_expired")
    # The code alone, in an attempt of its own: used before.
    stage.begin(browser)
    own = parse_qs(urlsplit(stage.begin(browser)).query)["state"][0]
    refused(browser.get(callback, params={"code": sent["code"], "state": own}), 401, "sign_in_refused")
    # A link that somebody else has begun: theirs is not to become this browser's session.
    stage.begin(other)
    refused(other.get(stage.agree(stage.begin(stage.browser()), "ada")), 401, "sign_in_expired")
    refused(browser.get(callback), 401, "sign_in_expired")


@pytest.mark.parametrize("lie", ["break_nonce", "break_challenge"])
def test_an_answer_to_another_question_is_refused(stage: Stage, lie: str) -> None:
    setattr(stage.provider, lie, True)
    try:
        _, answer = stage.sign_in("ada")
    finally:
        setattr(stage.provider, lie, False)
    refused(answer, 401, "sign_in_refused")


def test_a_provider_that_is_down(stage: Stage) -> None:
    browser = stage.browser()
    back = stage.agree(stage.begin(browser), "ada")
    stage.provider.is_down = True
    try:
        answer = browser.get(back)
    finally:
        stage.provider.is_down = False
    refused(answer, 503, "identity_provider_failed")
    assert stage.manager.log.read_text().count("sign-in: Example does not answer") == 1


def test_unknown_providers_and_odd_paths(stage: Stage) -> None:
    with stage.browser() as browser:
        refused(browser.post("/sign-in/nobody"), 404, "provider_not_found")
        for path in ("/sign-in/../api/v1/users", "/docs/../api/v1/users", "//api/v1/users", "/sign-in/%2e%2e/api/v1/users",
                     "/api/v1/users/", "/API/v1/users", "/health/..;/api/v1/users", "/sign-in/x\r\nSet-Cookie: a=b"):  # fmt: skip
            answer = browser.request(
                "GET",
                httpx.URL(stage.manager.url).copy_with(
                    raw_path=path.replace("\r\n", "%0d%0a").replace(" ", "%20").encode()
                ),
            )
            assert answer.status_code in (307, 401, 404, 405), path
            assert "items" not in answer.text
            assert "set-cookie" not in answer.headers


def test_a_session_is_good_on_its_own_pages_alone(stage: Stage) -> None:
    browser, _ = stage.sign_in("ada")
    made = browser.post("/api/v1/sandboxes?wait=true", json={})
    assert made.status_code == 201, made.text
    sandbox = made.json()["id"]
    terminal = browser.post(f"/api/v1/sandboxes/{sandbox}/terminals", json={"command": ["cat"]}).json()["id"]
    own, token = stage.manager.url, browser.cookies[COOKIE]
    host = urlsplit(own)
    foreign = [
        "",
        "null",
        "https://evil.example",
        f"https://{host.netloc}",
        f"http://{host.hostname}:1",
        # A preview's page, and its manager's: siblings of one site.
        f"http://8000-box.{host.netloc}",
        f"http://8000-box.atelier.localhost:{host.port}",
        f"{own}.evil.example",
    ]
    for origin in foreign:
        headers = {"Cookie": f"{COOKIE}={token}"} | ({"Origin": origin} if origin else {})
        answer = httpx.post(f"{own}/api/v1/sandboxes", json={}, headers=headers, verify=False)
        assert (answer.status_code, answer.json()["code"]) == (403, "wrong_origin"), origin
        for path in ("pty?command=cat", f"terminals/{terminal}/attach"):
            with pytest.raises(InvalidStatus) as socket_refused:
                connect(f"{own}/api/v1/sandboxes/{sandbox}/{path}".replace("http", "ws"), additional_headers=headers)
            assert socket_refused.value.response.status_code == 403, (path, origin)
            assert b"wrong_origin" in bytes(socket_refused.value.response.body or b""), (path, origin)
    headers = {"Cookie": f"{COOKIE}={token}", "Origin": own}
    attached = f"{own}/api/v1/sandboxes/{sandbox}/terminals/{terminal}/attach".replace("http", "ws")
    with connect(attached, additional_headers=headers) as socket:
        assert "joined" in str(socket.recv(timeout=20))
        assert browser.get(f"/api/v1/sandboxes/{sandbox}/terminals").json()["items"][0]["viewers"] == 1, "it alone"
    with connect(
        f"{own}/api/v1/sandboxes/{sandbox}/pty?command=cat".replace("http", "ws"), additional_headers=headers
    ) as socket:
        assert "started" in str(socket.recv(timeout=20))
        # Revoked in the middle: what is open stays so, the next request is refused.
        (session,) = [
            each for each in browser.get("/api/v1/sessions").json()["items"]
            if each["id"] == browser.get("/api/v1/whoami").json()["session_id"]
        ]  # fmt: skip
        assert browser.delete(f"/api/v1/sessions/{session['id']}").status_code == 204
        socket.send(b"echo still here\n")
        assert socket.recv(timeout=20)
    assert browser.get("/api/v1/whoami").status_code == 401
    with stage.manager.client() as admin:
        assert admin.delete(f"/api/v1/sandboxes/{sandbox}?wait=true").status_code == 204


def test_the_terminals_page_leads_to_the_sign_in_and_back(stage: Stage) -> None:
    page = "/sandboxes/box/terminal"
    html = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    browser = stage.browser()
    away = browser.get(page, headers=html)
    assert (away.status_code, away.headers["location"]) == (303, "/sign-in")
    back = browser.get(stage.agree(stage.begin(browser), "ada"))
    assert (back.status_code, back.headers["location"]) == (303, page)
    assert browser.get(page, headers=html).json()["code"] == "sandbox_not_found", "signed in, there is only no such box"
    again = browser.get(stage.agree(stage.begin(browser), "ada"))
    assert again.headers["location"] == "/sign-in", "one comes back once"
    # A session that has ended is none; a program is told so, and files of the page are for nobody.
    assert browser.post("/sign-out").status_code == 303
    assert browser.get(page, headers=html).status_code == 303
    assert browser.get(page).json()["code"] == "unauthenticated"
    assert browser.get("/terminal-assets/terminal.js", headers=html).json()["code"] == "unauthenticated"
    for odd in ("/sandboxes/Bo%0d%0ax/terminal", "/sandboxes/../terminal", "/sandboxes/%22;a/terminal", page + "/"):
        answer = browser.get(odd, headers=html)
        assert answer.status_code in (401, 404), odd
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "elsewhere",
    ["//evil.example/sandboxes/box/terminal", "https://evil.example", "/sandboxes/b/terminal/x", "/api/v1/whoami"],
)
def test_one_comes_back_to_pages_of_ours_only(stage: Stage, elsewhere: str) -> None:
    browser = stage.browser()
    back = stage.agree(stage.begin(browser), "ada")
    browser.cookies.set(f"{COOKIE}_return", elsewhere)
    assert browser.get(back).headers["location"] == "/sign-in"


def test_signing_out_ends_the_session(stage: Stage) -> None:
    browser, _ = stage.sign_in("ada")
    token = browser.cookies[COOKIE]
    assert "Sign out" in browser.get("/sign-in").text
    assert browser.post("/sign-out").status_code == 303
    answer = httpx.get(f"{stage.manager.url}/api/v1/whoami", headers={"Cookie": f"{COOKIE}={token}"}, verify=False)
    assert answer.status_code == 401
    with stage.manager.client() as admin:
        entries = admin.get("/api/v1/audit").json()["items"]
    newest = [(each["operation"], each["user_name"]) for each in entries if each["user_name"] == "Ada"][:2]
    assert newest == [("sign_out", "Ada"), ("sign_in", "Ada")]
