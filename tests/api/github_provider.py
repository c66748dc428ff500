"""``python -m tests.api.github_provider``: a GitHub Enterprise Server as far as a sign-in sees one. Who is asked to agree says
who they are by ``?login=`` beside what the manager has sent. Codes are good once, and with their PKCE verifier only."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, urlencode

from tests.api.provider_process import Environ, LyingApplication, StartResponse, respond, serve

PEOPLE: dict[str, dict[str, Any]] = {
    "grace": {"id": 1, "name": "Grace", "organizations": {"navy": "active"}},
    "linus": {"id": 2, "name": None, "organizations": {"navy": "pending"}},
    "mallory": {"id": 3, "name": "Mallory", "organizations": {"elsewhere": "active"}},
}


class GitHub(LyingApplication):
    def __init__(self) -> None:
        self._codes: dict[str, tuple[str, str]] = {}
        self._tokens: dict[str, str] = {}

    def answer(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
        match environ["PATH_INFO"]:
            case "/login/oauth/authorize":
                assert (query["client_id"], query["code_challenge_method"]) == ("hub-id", "S256")
                assert set(query["scope"].split()) == {"read:user", "user:email", "read:org"}
                code = secrets.token_hex(10)
                self._codes[code] = query["login"], query["code_challenge"]
                to = f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"
                start_response("302 Found", [("Location", to)])
                return []
            case "/login/oauth/access_token":
                return respond(start_response, "200 OK", self._give_token(environ))
        login = self._tokens.get(environ.get("HTTP_AUTHORIZATION", "").removeprefix("Bearer "))
        if login is None:
            return respond(start_response, "401 Unauthorized", {"message": "Bad credentials"})
        return respond(start_response, *self._tell(login, environ["PATH_INFO"]))

    def _give_token(self, environ: Environ) -> dict[str, str]:
        """GitHub says that it refuses with a status of 200."""
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
        sent = {name: values[0] for name, values in parse_qs(body).items()}
        basic = base64.b64encode(b"hub-id:hub-secret").decode()
        login, challenge = self._codes.pop(sent.get("code", ""), ("", ""))
        digest = hashlib.sha256(sent.get("code_verifier", "").encode()).digest()
        is_right = base64.urlsafe_b64encode(digest).decode().rstrip("=") == challenge and self.lie != "challenge"
        if environ.get("HTTP_AUTHORIZATION") != f"Basic {basic}" or not is_right:
            return {"error": "bad_verification_code", "error_description": "The code passed is incorrect or expired."}
        token = secrets.token_hex(10)
        self._tokens[token] = login
        return {"access_token": token, "token_type": "bearer", "scope": "read:org,read:user,user:email"}

    def _tell(self, login: str, path: str) -> tuple[str, object]:
        person = PEOPLE[login]
        if path == "/api/v3/user":
            return "200 OK", {"login": login, "id": person["id"], "name": person["name"]}
        if path == "/api/v3/user/emails":
            address = {"email": f"{login}@hub.example", "primary": True, "verified": self.lie != "unverified"}
            return "200 OK", [{"email": "other@hub.example", "primary": False, "verified": True}, address]
        organization = path.removeprefix("/api/v3/user/memberships/orgs/")
        if state := person["organizations"].get(organization):
            return "200 OK", {"state": state}
        return "404 Not Found", {"message": "Not Found"}


if __name__ == "__main__":
    serve(GitHub())
