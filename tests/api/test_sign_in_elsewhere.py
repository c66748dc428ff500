"""Signing in with a GitHub, and with providers that nobody reaches or that are somebody else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from tests.api.provider_process import EVERYWHERE, provider_process
from tests.api.test_sign_in import Stage, refused
from tests.running_manager import start_manager, stop_manager


@contextmanager
def manager_with(variables: dict[str, str], provider: object) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        manager = start_manager(Path(folder), variables={"ATELIER_SIGN_INS_PER_MINUTE": "0", **variables})
        try:
            yield Stage(manager, provider)  # type: ignore[arg-type]
        finally:
            stop_manager(manager)
        assert "Traceback" not in manager.log.read_text()


class Hub(Stage):
    def begin(self, browser: httpx.Client) -> str:
        answer = browser.post("/sign-in/github")
        assert answer.status_code == 303, answer.text
        return answer.headers["location"]

    def agree(self, url: str, who: str) -> str:
        answer = httpx.get(f"{url}&login={who}", verify=False)
        assert answer.status_code == 302, answer.text
        return answer.headers["location"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with provider_process("tests.api.github_provider") as provider:
        variables = {
            "ATELIER_GITHUB_CLIENT_ID": "hub-id",
            "ATELIER_GITHUB_CLIENT_SECRET": "hub-secret",
            "ATELIER_GITHUB_ORGANIZATIONS": "army,navy",
            "ATELIER_GITHUB_URL": provider.url,
        }
        with manager_with(variables, provider) as stage:
            yield Hub(stage.manager, provider)


def test_a_member_of_the_organisation_enters(hub: Hub) -> None:
    browser, answer = hub.sign_in("grace")
    assert answer.status_code == 303, answer.text
    who = browser.get("/api/v1/whoami").json()
    assert (who["name"], who["role"]) == ("Grace", "member")
    with hub.manager.client() as admin:
        emails = [each["email"] for each in admin.get("/api/v1/users").json()["items"]]
    assert "grace@hub.example" in emails
    # Their address is not what they are known by.
    with hub.provider.lying("unverified"):
        again, _ = hub.sign_in("grace")
    assert again.get("/api/v1/whoami").json()["user_id"] == who["user_id"]


@pytest.mark.parametrize("login", ["linus", "mallory"])
def test_who_is_no_active_member_is_kept_out_until_an_admin_says_otherwise(hub: Hub, login: str) -> None:
    _, answer = hub.sign_in(login)
    refused(answer, 403, "not_admitted")
    with hub.manager.client() as admin:
        assert admin.post("/api/v1/users", json={"email": f"{login}@hub.example"}).status_code == 201
    with hub.provider.lying("unverified"):
        _, answer = hub.sign_in(login)
    refused(answer, 403, "not_admitted")
    browser, answer = hub.sign_in(login)
    assert answer.status_code == 303, answer.text
    assert browser.get("/api/v1/whoami").json()["role"] == "member"


def test_codes_are_good_once_and_for_their_attempt(hub: Hub) -> None:
    browser = hub.browser()
    back = hub.agree(hub.begin(browser), "grace")
    code = parse_qs(urlsplit(back).query)["code"][0]
    assert browser.get(back).status_code == 303
    refused(browser.get(back), 401, "sign_in_expired")
    own = parse_qs(urlsplit(hub.begin(browser)).query)["state"][0]
    answer = browser.get("/sign-in/github/callback", params={"code": code, "state": own})
    refused(answer, 401, "sign_in_refused")
    with hub.provider.lying("challenge"):
        _, answer = hub.sign_in("grace")
    refused(answer, 401, "sign_in_refused")


@pytest.mark.parametrize("lie", EVERYWHERE)
def test_a_github_that_is_down_or_answers_nonsense(hub: Hub, lie: str) -> None:
    browser = hub.browser()
    back = hub.agree(hub.begin(browser), "grace")
    with hub.provider.lying(lie):
        answer = browser.get(back)
    assert answer.status_code in (401, 503)
    refused(answer, answer.status_code, "identity_provider_failed" if answer.status_code == 503 else "sign_in_refused")


def test_a_provider_that_cannot_be_reached_and_one_that_is_somebody_else() -> None:
    with provider_process("tests.api.identity_provider") as provider:
        variables = {
            "ATELIER_OIDC_ISSUER": provider.url,
            "ATELIER_OIDC_CLIENT_ID": "atelier",
            "ATELIER_OIDC_CLIENT_SECRET": "secret",
            "ATELIER_OIDC_TITLE": "Example",
        }
        with manager_with(variables, provider) as stage, stage.browser() as browser:
            with provider.lying("another issuer"):
                answer = browser.post("/sign-in/oidc")
                refused(answer, 503, "identity_provider_failed")
                assert "evil.example" in answer.text
            for lie in EVERYWHERE:
                with provider.lying(lie):
                    refused(browser.post("/sign-in/oidc"), 503, "identity_provider_failed")
            told = stage.manager.log.read_text().count("sign-in: Example does not answer")
            provider.end()
            refused(browser.post("/sign-in/oidc"), 503, "identity_provider_failed")
            log = stage.manager.log.read_text()
            assert log.count("sign-in: Example does not answer") == told + 1


def test_a_second_first_run_link_is_the_only_good_one() -> None:
    with manager_with({}, None) as stage, stage.browser() as browser, stage.manager.client() as admin:

        def enter(secret: str) -> httpx.Response:
            return browser.post("/sign-in/first-run", data={"secret": secret})

        printed = stage.manager.log.read_text().partition("/sign-in/first-run?secret=")[2].split()[0]
        first, second = (admin.post("/api/v1/first-run-link").json()["url"].partition("secret=")[2] for _ in range(2))
        for old in (printed, first):
            refused(enter(old), 401, "first_run_link_invalid")
        assert enter(second).status_code == 303
        assert browser.get("/api/v1/whoami").json()["role"] == "admin"
        refused(enter(second), 409, "first_run_over")
        # Who lost their browser gets another from the manager's machine, as long as nobody else is an admin.
        third = admin.post("/api/v1/first-run-link").json()["url"].partition("secret=")[2]
        assert enter(third).status_code == 303
