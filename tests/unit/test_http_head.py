"""Heads of HTTP messages: what is understood, what is refused, and what is written of them."""

from __future__ import annotations

import h11
import pytest

from atelier.gateway.http_head import (
    HEADERS_MAX,
    BadHead,
    Body,
    RequestFields,
    parse_request_fields,
    parse_request_line,
    parse_response,
    write_request_fields,
    write_request_line,
    write_response,
)


def parse_request(head: bytes) -> RequestFields:
    line, _, lines = head.partition(b"\r\n")
    return parse_request_fields(lines, is_http_1_0=parse_request_line(line)[2])


def written_anew(head: bytes) -> bytes:
    method, target, is_http_1_0 = parse_request_line(head.partition(b"\r\n")[0])
    fields = parse_request(head)
    line = write_request_line(method, target, is_http_1_0=is_http_1_0)
    return line + write_request_fields(fields, fields.headers)


REFUSED_REQUESTS = {
    "no version": b"GET /\r\nHost: a",
    "HTTP/2": b"GET / HTTP/2.0\r\nHost: a",
    "HTTP/0.9": b"GET / HTTP/0.9\r\nHost: a",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a",
    "a tab": b"GET\t/ HTTP/1.1\r\nHost: a",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: a",
    "an absolute target": b"GET http://b/ HTTP/1.1\r\nHost: a",
    "CONNECT": b"CONNECT a:80 HTTP/1.1\r\nHost: a",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: a",
    "a star that is not OPTIONS'": b"GET * HTTP/1.1\r\nHost: a",
    "bytes beyond ASCII in the target": b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a",
    "NUL in the target": b"GET /\x00 HTTP/1.1\r\nHost: a",
    "a long method": b"G" * 33 + b" / HTTP/1.1\r\nHost: a",
    "no host": b"GET / HTTP/1.1\r\nX: y",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a",
    "an empty line first": b"\r\nGET / HTTP/1.1\r\nHost: a",
    "a folded header": b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n z",
    "space before the colon": b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 1",
    "no colon": b"GET / HTTP/1.1\r\nHost: a\r\nnonsense",
    "no name": b"GET / HTTP/1.1\r\nHost: a\r\n: x",
    "a lone LF": b"GET / HTTP/1.1\r\nHost: a\r\nX: y\nZ: w",
    "a lone CR": b"GET / HTTP/1.1\r\nHost: a\r\nX: y\rZ: w",
    "LF alone ends a line": b"GET / HTTP/1.1\nHost: a",
    "NUL in a value": b"GET / HTTP/1.1\r\nHost: a\r\nX: y\x00",
    "DEL in a value": b"GET / HTTP/1.1\r\nHost: a\r\nX: y\x7f",
    "length and chunks": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1",
    "two lengths in one": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1",
    "a signed length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1",
    "a negative length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1",
    "a hexadecimal length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1",
    "an empty length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length:",
    "a length beyond all": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 19,
    "another coding": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked",
    "chunked twice": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "a coding that nearly is": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked",
    "too many headers": b"GET / HTTP/1.1\r\nHost: a" + b"\r\nX: y" * HEADERS_MAX,
}


@pytest.mark.parametrize("head", REFUSED_REQUESTS.values(), ids=REFUSED_REQUESTS)
def test_what_is_no_request(head: bytes) -> None:
    with pytest.raises(BadHead) as refused:
        parse_request(head)
    assert refused.value.status in (400, 405, 431, 501)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity",
        b"HTTP/1.1 200 OK\r\nX: y\r\n folded",
        b"HTTP/1.1 200 OK\r\nX: y\nSet-Cookie: z",
        b"HTTP/1.1 200 O\x00K",
        b"HTTP/1.1 099 No",
        b"HTTP/1.1 2000 No",
        b"HTTP/1.1 OK",
        b"HTTP/2 200",
        b"nonsense",
        b"",
    ],
)
def test_what_is_no_answer(head: bytes) -> None:
    with pytest.raises(BadHead):
        parse_response(head)


def test_a_request_as_it_is_written_anew() -> None:
    sent = (
        b"POST /a%20b?c HTTP/1.1\r\nHost: box\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: x\r\nTE: trailers"
        b"\r\nCookie:  a=b \r\ntransfer-encoding: Chunked\r\nProxy-Connection: x\r\nX-Empty:\r\nX-Latin: \xe4"
    )
    head = parse_request(sent)
    assert head.body == Body("chunked")
    assert head.keeps_alive
    assert written_anew(sent) == (
        b"POST /a%20b?c HTTP/1.1\r\nHost: box\r\nCookie: a=b\r\nX-Empty: \r\nX-Latin: \xe4\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"
    )


def test_whoever_names_what_matters_as_a_hop_does_not_take_it_out() -> None:
    sent = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: host, content-length, cookie\r\nContent-Length: 3\r\nCookie: x=y"
    assert written_anew(sent) == (
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nCookie: x=y\r\nConnection: keep-alive\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("lines", "is_one"),
    [
        (b"Connection: Upgrade\r\nUpgrade: websocket", True),
        (b"Connection: keep-alive, upgrade\r\nUpgrade: WebSocket", True),
        (b"Upgrade: websocket", False),
        (b"Connection: Upgrade\r\nUpgrade: h2c", False),
        (b"Connection: Upgrade\r\nUpgrade: websocket, h2c", False),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5", False),
    ],
)
def test_only_web_sockets_are_switched_to(lines: bytes, is_one: bool) -> None:
    sent = b"GET / HTTP/1.1\r\nHost: a\r\n" + lines
    assert parse_request(sent).is_web_socket is is_one
    assert (b"Upgrade: websocket" in written_anew(sent)) is is_one


def test_keeping_connections() -> None:
    assert parse_request(b"GET / HTTP/1.1\r\nHost: a").keeps_alive
    assert not parse_request(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Close").keeps_alive
    assert not parse_request(b"GET / HTTP/1.0\r\nHost: a").keeps_alive
    assert parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 0").keeps_alive
    assert not parse_response(b"HTTP/1.1 200 OK").keeps_alive
    assert not parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close").keeps_alive


def test_bodies_of_answers() -> None:
    assert parse_response(b"HTTP/1.1 200 OK").body == Body("close")
    assert parse_response(b"HTTP/1.1 200").body == Body("close")
    assert parse_response(b"HTTP/1.1 204 No\r\nContent-Length: 5").body == Body("none")
    assert parse_response(b"HTTP/1.1 304 No\r\nTransfer-Encoding: chunked").body == Body("none")
    answer = parse_response(b"HTTP/1.1 200 Fine \r\nContent-Length: 5\r\nConnection: x-hop\r\nX-Hop: 1")
    assert answer.body == Body("length", 5)
    assert write_response(answer, answer.headers, answer.body, keeps_alive=False) == (
        b"HTTP/1.1 200 Fine \r\nContent-Length: 5\r\nConnection: close\r\n\r\n"
    )


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PROPFIND", "M-SEARCH"])
@pytest.mark.parametrize("target", ["/", "/a;b?c=[d]&e=%00", "/../..//x", "/.well-known/x", "/" + "a" * 8000])
def test_what_is_written_a_known_library_understands_alike(method: str, target: str) -> None:
    written = written_anew(f"{method} {target} HTTP/1.1\r\nhost: box\r\nX-One: a\r\nX-One: b, c".encode("latin-1"))
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(written)
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method.decode(), event.target.decode()) == (method, target)
    assert list(event.headers) == [
        (b"host", b"box"),
        (b"x-one", b"a"),
        (b"x-one", b"b, c"),
        (b"connection", b"keep-alive"),
    ]
