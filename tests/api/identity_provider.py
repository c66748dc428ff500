"""``python -m tests.api.identity_provider``: a real OpenID Connect provider on a port of this machine, which insists on PKCE
and a nonce, and can be made to lie.

Its lies are those of ``provider_process``, and: ``nonce`` (ID tokens for another than was sent), ``challenge`` (as though the
browser had brought that of another attempt), those of ``TOKENS`` (about the ID token), and ``another issuer``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

import oidc_provider_mock
from joserfc import jwt
from joserfc.jwk import RSAKey
from oidc_provider_mock import User
from tests.api.provider_process import Environ, LyingApplication, StartResponse, respond, serve
from werkzeug.test import run_wsgi_app

TOKENS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no nonce": lambda claims: {name: value for name, value in claims.items() if name != "nonce"},
    "another audience": lambda claims: {**claims, "aud": "somebody-else"},
    "an expired token": lambda claims: {**claims, "iat": int(time.time()) - 7200, "exp": int(time.time()) - 3600},
    "a token of another issuer": lambda claims: {**claims, "iss": "http://evil.example"},
    "a token for another program": lambda claims: {**claims, "azp": "somebody-else"},
    "an unknown key": dict,
    "no signature": dict,
}
"""What becomes of an ID token's claims; but for the last two it is signed by a key that the provider names as its own."""


class IdentityProvider(LyingApplication):
    def __init__(self) -> None:
        people = [
            User(sub="ada", claims={"name": "Ada", "email": "ada@example.org", "email_verified": True}),
            User(sub="bob", claims={"name": "Bob", "email": "bob@example.org", "email_verified": False}),
            User(sub="eve", claims={"name": "Eve", "email": "eve@elsewhere.example", "email_verified": True}),
            User(sub="ada-too", claims={"name": "Not Ada", "email": "ada@example.org", "email_verified": True}),
        ]
        self._application = oidc_provider_mock.app(user_claims=people, require_nonce=True)
        self._challenges: dict[str, str] = {}
        self._key = RSAKey.generate_key(2048, {"kid": "another"}, auto_kid=False)

    def answer(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/oauth2/authorize" and environ["REQUEST_METHOD"] == "POST":
            return self._authorize(environ, start_response)
        if path == "/oauth2/token":
            return self._give_token(environ, start_response)
        if path == "/jwks" and self.lie in TOKENS and self.lie != "an unknown key":
            return respond(start_response, "200 OK", {"keys": [self._key.as_dict(private=False)]})
        if path == "/.well-known/openid-configuration" and self.lie == "another issuer":
            return respond(
                start_response, "200 OK", {"issuer": "http://evil.example", "token_endpoint": "http://evil.example"}
            )
        return self._application(environ, start_response)

    def _authorize(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
        assert query["code_challenge_method"] == "S256"
        if self.lie == "nonce":
            environ["QUERY_STRING"] = environ["QUERY_STRING"].replace(query["nonce"], "another")

        def noting(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            for name, value in headers:
                if name.lower() == "location" and "code=" in value:
                    self._challenges[parse_qs(value.partition("?")[2])["code"][0]] = query["code_challenge"]
            return start_response(status, headers, *rest)

        return self._application(environ, noting)

    def _give_token(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        environ["wsgi.input"] = io.BytesIO(body)
        sent = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        digest = hashlib.sha256(sent.get("code_verifier", "").encode()).digest()
        if self.lie == "challenge" or self._challenges.get(sent["code"]) != _encoded(digest):
            return respond(start_response, "400 Bad Request", {"error": "invalid_grant"})
        if self.lie not in TOKENS:
            return self._application(environ, start_response)
        pieces, _, _ = run_wsgi_app(self._application, environ)
        given = json.loads(b"".join(pieces))
        claims = TOKENS[self.lie](json.loads(_decoded(given["id_token"].split(".")[1])))
        if self.lie == "no signature":
            header = _encoded(json.dumps({"alg": "none", "typ": "JWT"}).encode())
            given["id_token"] = f"{header}.{_encoded(json.dumps(claims).encode())}."
        else:
            given["id_token"] = jwt.encode({"alg": "RS256", "kid": "another"}, claims, self._key)
        return respond(start_response, "200 OK", given)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


if __name__ == "__main__":
    serve(IdentityProvider())
