"""A real OpenID Connect provider on a port of this machine, which insists on PKCE and can be made to lie."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

import oidc_provider_mock
from oidc_provider_mock import User
from werkzeug.serving import make_server

StartResponse = Callable[..., Any]


class Provider:
    """``break_nonce``: ID tokens are made for another nonce than the one that was sent. ``break_challenge``: as though the
    browser had brought the challenge of another attempt. ``is_down``: it answers with errors."""

    def __init__(self) -> None:
        people = [
            User(sub="ada", claims={"name": "Ada", "email": "ada@example.org", "email_verified": True}),
            User(sub="bob", claims={"name": "Bob", "email": "bob@example.org", "email_verified": False}),
            User(sub="eve", claims={"name": "Eve", "email": "eve@elsewhere.example", "email_verified": True}),
            User(sub="ada-too", claims={"name": "Not Ada", "email": "ada@example.org", "email_verified": True}),
        ]
        self._application = oidc_provider_mock.app(user_claims=people, require_nonce=True)
        self._challenges: dict[str, str] = {}
        self.break_nonce = self.break_challenge = self.is_down = False
        self.port = 0

    @property
    def issuer(self) -> str:
        return f"http://localhost:{self.port}"

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if self.is_down:
            return _answer(start_response, "500 Internal Server Error", {"error": "down"})
        if environ["PATH_INFO"] == "/oauth2/authorize" and environ["REQUEST_METHOD"] == "POST":
            return self._authorize(environ, start_response)
        if environ["PATH_INFO"] == "/oauth2/token":
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = io.BytesIO(body)
            sent = {name: values[0] for name, values in parse_qs(body.decode()).items()}
            digest = hashlib.sha256(sent.get("code_verifier", "").encode()).digest()
            challenge = base64.urlsafe_b64encode(digest).decode().rstrip("=")
            if self.break_challenge or self._challenges.get(sent["code"]) != challenge:
                return _answer(start_response, "400 Bad Request", {"error": "invalid_grant"})
        return self._application(environ, start_response)

    def _authorize(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
        assert query["code_challenge_method"] == "S256"
        if self.break_nonce:
            environ["QUERY_STRING"] = environ["QUERY_STRING"].replace(query["nonce"], "another")

        def noting(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            for name, value in headers:
                if name.lower() == "location" and "code=" in value:
                    self._challenges[parse_qs(value.partition("?")[2])["code"][0]] = query["code_challenge"]
            return start_response(status, headers, *rest)

        return self._application(environ, noting)


def _answer(start_response: StartResponse, status: str, body: dict[str, str]) -> list[bytes]:
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]


@contextmanager
def identity_provider() -> Iterator[Provider]:
    provider = Provider()
    server = make_server("localhost", 0, provider, threaded=True)
    provider.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.1,))
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
