"""GitHub, or a GitHub Enterprise Server. Source: GitHub docs, "Authorizing OAuth apps", REST API 2022-11-28."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from atelier.drivers.sign_in.interface import SignInAttempt
from atelier.drivers.sign_in.oauth_client import oauth_client
from atelier.model.principal import SignedInPerson

_SCOPE = "read:user user:email read:org"
PUBLIC_URL = "https://github.com"


class GitHubProvider:
    """``organizations``: active members of any of these are admitted; empty: membership admits nobody."""

    name = "github"
    title = "GitHub"

    def __init__(self, client_id: str, client_secret: str, organizations: Sequence[str], url: str = PUBLIC_URL) -> None:
        self._client_id = client_id
        self._client_secret = client_secret
        self._organizations = organizations
        self._url = url.rstrip("/")
        self._api = "https://api.github.com" if self._url == PUBLIC_URL else f"{self._url}/api/v3"

    async def make_url(self, attempt: SignInAttempt) -> str:
        async with self._client(attempt) as client:
            url, _ = client.create_authorization_url(
                f"{self._url}/login/oauth/authorize", state=attempt.state, code_verifier=attempt.code_verifier
            )
            return str(url)

    async def find_person(self, attempt: SignInAttempt, code: str) -> SignedInPerson:
        async with self._client(attempt) as client:
            await client.fetch_token(
                f"{self._url}/login/oauth/access_token",
                code=code,
                code_verifier=attempt.code_verifier,
                headers={"Accept": "application/json"},
            )
            user = await self._get(client, "/user")
            emails = await self._get(client, "/user/emails")
            is_member = False
            for organization in self._organizations:
                is_member = is_member or await self._is_member(client, organization)
        primary = next((each for each in emails if each["primary"] and each["verified"]), None)
        return SignedInPerson(
            provider=self.name,
            subject=f"{self._url} {int(user['id'])}",
            name=str(user.get("name") or user["login"])[:100],
            email=str(primary["email"]).lower() if primary else "",
            is_admitted=is_member,
        )

    def _client(self, attempt: SignInAttempt) -> Any:
        return oauth_client(self.title, self._client_id, self._client_secret, attempt, _SCOPE)

    async def _get(self, client: Any, path: str) -> Any:
        answer = await client.get(f"{self._api}{path}", headers={"Accept": "application/vnd.github+json"})
        answer.raise_for_status()
        return answer.json()

    async def _is_member(self, client: Any, organization: str) -> bool:
        url = f"{self._api}/user/memberships/orgs/{quote(organization, safe='')}"
        answer = await client.get(url, headers={"Accept": "application/vnd.github+json"})
        if answer.status_code in (403, 404):
            return False
        answer.raise_for_status()
        return answer.json().get("state") == "active"
