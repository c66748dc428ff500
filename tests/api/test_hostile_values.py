"""Values that break what is careless, at every place where the API takes one: each gets an answer in the form of errors, or is
taken as what it is; nothing is an error of the manager's own, and nothing of it comes back in a header."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from tests.api.described_api import DOCUMENT, DescribedApi, described_api, ends_the_manager
from tests.api.described_places import Bodies
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

document = json.loads(DOCUMENT.read_text())
OPERATIONS = [
    (method.upper(), path, operation)
    for path, operations in document["paths"].items()
    for method, operation in operations.items()
]
TEXTS = [
    "\0",
    "a\0b",
    "\ud800",
    "a\udcff",
    "x\r\nSet-Cookie: a=b",
    "../../etc/passwd",
    "-",
    "²",
    "İ\u202e",
    "9" * 5000,
    "x" * 70_000,
]
NUMBERS = [2**31, 2**63, -(2**63) - 1, 10**30, float("inf"), float("nan"), -0.0, 1e308]
OTHERS = [None, True, [], {}, [[[]]], {"a": {"b": "\0"}}, ""]
RAW = [b"\0", b"%00", b"\xff\xfe", b"\xed\xa0\x80", b"\xb2", str(2**64).encode(), b"9" * 5000, b"", b"x" * 5000, b"a\r\nX-Evil: 1",
       b"../..", b"%", b"true", b"-1", b"1e400", b"nan", b"'; DROP TABLE users; --", b"\xe2\x80\xae"]  # fmt: skip
HEADERS = [b"\xb2", b"9" * 5000, str(2**64).encode(), b"\xff", b" ", b"-1", b"x" * 500, b"bytes=" + b"9" * 5000 + b"-", b"bytes=-" + b"9" * 5000,
           b"bytes=5-1", b"bytes=\xb2-", b"bytes=0-" + str(2**64).encode()]  # fmt: skip
BODIES = [
    b"",
    b"{",
    b"\xff",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'"\\ud800"',
    b"1e999",
    b"-" + b"9" * 5000,
    b"null",
]
DUE = {"insufficient_capacity", "network_policy_pending"}
"""Errors of the server's side that a valid request may meet."""


@pytest.fixture(scope="module")
def stage() -> Iterator[DescribedApi]:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder, described_api(Path(folder)) as opened:
        yield opened


class Client:
    """Sends bytes as they are, where clients of more comfort would refuse or mend them."""

    def __init__(self, stage: DescribedApi) -> None:
        self._key = stage.manager.key
        self._connection = HTTPConnection(urlsplit(stage.manager.url).netloc, timeout=60)

    def send(self, method: str, target: str, body: bytes | None = None, **headers: bytes) -> tuple[int, bytes, Any]:
        """(status, content, headers); of a stream, what comes first."""
        connection = self._connection
        connection.putrequest(method, target)
        connection.putheader("Authorization", f"Bearer {self._key}")
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        try:
            if answer.headers.get_content_type() in ("text/event-stream", "application/x-ndjson"):
                return answer.status, answer.read1(), answer.headers
            return answer.status, answer.read(), answer.headers
        finally:
            answer.close()
            connection.close()


def judge(answer: tuple[int, bytes, Any]) -> str:
    """What is wrong with an answer, or nothing."""
    status, content, headers = answer
    if "x-evil" in headers or "set-cookie" in headers:
        return f"a header came back: {headers}"
    if status < 400:
        return ""
    try:
        error = json.loads(content)
        code, message = error["code"], error["message"]
    except (ValueError, TypeError, KeyError):
        return f"{status} in no form of errors: {content[:200]!r}"
    if not code or not message:
        return f"{status} says nothing"
    if status >= 500 and code not in DUE:
        return f"{status} {code}: {message[:200]}"
    return f"{len(content)} bytes of error" if len(content) > 10_000 else ""


def filled(path: str, names: dict[str, str], **others: str) -> str:
    for name, value in {**names, **others}.items():
        path = path.replace(f"{{{name}}}", value)
    assert "{" not in path
    return path


def hostile_to(present: object) -> list[Any]:
    """Values that may come where this one is expected, most of them of its type: others end at the door."""
    match present:
        case bool():
            return [None, 2, "x"]
        case str():
            return [*TEXTS, None, 2**63, []]
        case int() | float():
            return [*NUMBERS, None, True, "²"]
        case _:
            return OTHERS


def requests_of(
    method: str, path: str, operation: dict[str, Any], names: dict[str, str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, target, what else is sent)"""
    parameters = operation.get("parameters", [])
    json_body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    bodies = Bodies(document)
    least: dict[str, Any] = {}
    if json_body is not None:
        sample = json.dumps(bodies.sample(json_body["schema"])).encode()
        least = {"body": sample, "Content_Type": b"application/json"}
    needed = "&".join(f"{each['name']}=x" for each in parameters if each["in"] == "query" and each.get("required"))
    target = filled(path, names)
    for parameter in parameters:
        name = parameter["name"]
        if parameter["in"] == "path":
            # A sandbox is looked up before all routes, in the same place.
            for value in RAW[:5] if name == "sandbox" else RAW:
                yield (
                    f"path {name} {value[:20]!r}",
                    f"{filled(path, names, **{name: quote(value, safe='')})}?{needed}",
                    least,
                )
        elif parameter["in"] == "query":
            for value in RAW:
                yield f"query {name} {value[:20]!r}", f"{target}?{name}={quote(value)}&{needed}", least
        else:
            for value in HEADERS:
                yield f"header {name} {value[:20]!r}", f"{target}?{needed}", {**least, name.replace("-", "_"): value}
    if operation["operationId"] == "read_file":
        for value in HEADERS:
            yield f"range {value[:20]!r}", f"{target}?path=/etc/hostname", {"Range": value}
    if json_body is None:
        return
    for place, value, body in bodies.with_values(json_body["schema"], hostile_to):
        yield f"body {place} {str(value)[:20]!r}", f"{target}?{needed}", {**least, "body": json.dumps(body).encode()}
    for body in BODIES:
        yield f"body {body[:20]!r}", f"{target}?{needed}", {**least, "body": body}


@pytest.mark.parametrize(
    ("method", "path", "operation"), OPERATIONS, ids=[each[2]["operationId"] for each in OPERATIONS]
)
def test_hostile_values(stage: DescribedApi, method: str, path: str, operation: dict[str, Any]) -> None:
    client = Client(stage)
    stage.renew(path)
    wrong: list[str] = []
    for place, target, sent in requests_of(method, path, operation, dict(stage.names)):
        if ends_the_manager(operation["operationId"], parsed(sent.get("body"))):
            continue
        if method != "GET":
            stage.renew(path)
        if told := judge(client.send(method, target, **sent)):
            wrong.append(f"{place}: {told}")
    assert not wrong, "\n".join(wrong)


PAGES = [
    ("GET", "/sign-in/first-run?secret="), ("GET", "/sign-in/oidc/callback?code=x&state="), ("GET", "/sign-in/oidc/callback?code="),
    ("POST", "/sign-in/"), ("GET", "/sign-in/"), ("GET", "/previews/enter?host="), ("GET", "/previews/enter?host=a&next="),
    ("GET", "/terminal-assets/"), ("GET", "/sandboxes/"), ("GET", "/docs/"), ("GET", "/"), ("HEAD", "/"), ("BREW", "/"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PAGES)
def test_pages_that_are_in_no_document(stage: DescribedApi, method: str, path: str) -> None:
    client = Client(stage)
    for value in RAW:
        status, content, headers = client.send(method, path + quote(value), Origin=stage.manager.url.encode())
        assert status < 500, (value, content)
        assert "x-evil" not in headers, value
        assert b"Traceback" not in content


@pytest.mark.parametrize("path", ["pty?command=cat&{}=", "terminals/{terminal}/attach?{}="])
def test_web_sockets_and_their_queries(stage: DescribedApi, path: str) -> None:
    """They are refused, or say why they close, or serve."""
    stage.renew("{sandbox}/{terminal}")
    base = f"{stage.manager.url}/api/v1/sandboxes/{stage.names['sandbox']}/".replace("http", "ws")
    path = path.replace("{terminal}", stage.names["terminal"])
    for name in ("columns", "rows", "command", "user", "working_directory", "pid"):
        for value in RAW:
            try:
                with connect(base + path.format(name) + quote(value), additional_headers=bearer(stage)) as socket:
                    first = json.loads(socket.recv(timeout=30))
                    assert first["type"] in ("started", "joined", "failed"), (name, value, first)
                    assert first.get("code") != "internal", (name, value)
            except InvalidStatus as refused:
                assert refused.response.status_code in (400, 403, 404, 422), (name, value)


def test_nonsense_in_a_web_socket(stage: DescribedApi) -> None:
    """What is of no known form is passed over, and the terminal goes on."""
    stage.renew("{sandbox}")
    url = f"{stage.manager.url}/api/v1/sandboxes/{stage.names['sandbox']}/pty?command=cat".replace("http", "ws")
    with connect(url, additional_headers=bearer(stage)) as socket:
        assert json.loads(socket.recv(timeout=30))["type"] == "started"
        for text in ["", "{", "[" * 100_000, "null", '"\\ud800"', '{"type":"resize"}', '{"type":"resize","columns":1e400,"rows":1}',
                     '{"type":"resize","columns":0,"rows":99999999999999999999}', '{"type":"resize","columns":"²","rows":[]}']:  # fmt: skip
            socket.send(text)
        socket.send(b"still here\n")
        shown = b""
        while b"still here" not in shown:
            piece = socket.recv(timeout=30)
            assert isinstance(piece, bytes)
            shown += piece


def bearer(stage: DescribedApi) -> dict[str, str]:
    return {"Authorization": f"Bearer {stage.manager.key}"}


def parsed(body: bytes | None) -> object:
    try:
        return json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return None
