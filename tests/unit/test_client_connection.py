"""Connections: errors in words, safe retries, streams, keys and proxies. Against a transport in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx
import pytest

from atelier import AsyncSandbox, Sandbox
from atelier.client import calls
from atelier.client.connection import AsyncConnection, Connection
from atelier.client.environment import Endpoint
from atelier.client.events import follow_events
from atelier.client.sandbox_failures import SandboxFailedError
from atelier.model.errors import AtelierError, NotFoundError, TimeoutExceededError, TransientError
from atelier.model.guest import ProcessEnded, ProcessOutput, ProcessStarted

ENDPOINT = Endpoint("http://box.localhost:7420", "the-key")
SANDBOX = {
    "id": "abcdefghijkl", "name": "box", "state": "running", "image": "base", "image_id": "", "vcpu_count": 1,
    "memory_mib": 512, "disk_mib": 4096, "labels": {}, "created_at": "2024-01-01T00:00:00Z",
    "updated_at": "2024-01-01T00:00:00Z",
}  # fmt: skip


def connection(answer: Callable[[httpx.Request], httpx.Response]) -> Connection:
    return Connection(ENDPOINT, transport=httpx.MockTransport(answer))


def test_the_key_and_the_name_go_with_every_request_to_this_machine() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=SANDBOX)

    connection(answer).send(calls.get_sandbox("box"))
    assert seen[0].url.host == "127.0.0.1"
    assert seen[0].headers["host"] == "box.localhost:7420"
    assert seen[0].headers["authorization"] == "Bearer the-key"


def test_redirects_are_not_followed_with_the_key() -> None:
    requests: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(str(request.url))
        return httpx.Response(307, headers={"Location": "http://evil.example/"})

    with pytest.raises(AtelierError):
        connection(answer).send(calls.get_sandbox("box"))
    assert len(requests) == 1


def test_nobody_there_names_the_remedy() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused", request=request)

    with pytest.raises(TransientError) as caught:
        connection(answer).send(calls.get_sandbox("box"))
    assert caught.value.code == "manager_unreachable"
    assert "atelier up" in caught.value.hint


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_only_what_may_be_asked_twice_is_asked_twice(method: str) -> None:
    attempts = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise httpx.RemoteProtocolError("Server disconnected", request=request)
        return httpx.Response(200, json=SANDBOX)

    link = connection(answer)
    if method == "GET":
        assert link.send(calls.get_sandbox("box")).name == "box"
        assert attempts == 2
    else:
        with pytest.raises(TransientError) as caught:
            link.send(calls.send_signal("box", 1, "TERM"))
        assert caught.value.code == "connection_lost"
        assert attempts == 1


def test_an_error_answer_to_a_stream_is_read_and_raised() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={"code": "sandbox_not_found", "message": "no box", "hint": "atelier ls"})

    stream = calls.attach_process("box", 3)
    with pytest.raises(NotFoundError) as caught:
        list(connection(answer).lines(stream))
    assert caught.value.code == "sandbox_not_found"


def lines(*events: dict[str, object]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


STARTED = {"type": "started", "pid": 5}
OUTPUT = {"type": "output", "stream": "stdout", "data": "aGk="}
ENDED = {"type": "ended", "exit_code": 3, "status": "exit status 3"}


def sandbox_answers(body: bytes) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/exec"):
            return httpx.Response(200, content=body)
        return httpx.Response(200, json=SANDBOX)

    return answer


def test_an_execution_yields_events_and_knows_its_pid() -> None:
    sandbox = Sandbox.connect("box", connection=connection(sandbox_answers(lines(STARTED, OUTPUT, ENDED))))
    with sandbox.exec(["x"]) as execution:
        assert execution.pid == 5
        assert list(execution) == [ProcessStarted(5), ProcessOutput("stdout", b"hi"), ProcessEnded(3, "exit status 3")]
        assert execution.wait().exit_code == 3


def test_a_stream_that_breaks_off_is_no_result() -> None:
    sandbox = Sandbox.connect("box", connection=connection(sandbox_answers(lines(STARTED, OUTPUT))))
    with pytest.raises(TransientError) as caught:
        sandbox.exec(["x"]).wait()
    assert caught.value.code == "connection_lost"
    sandbox = Sandbox.connect("box", connection=connection(sandbox_answers(lines(STARTED, OUTPUT) + b'{"type":')))
    with pytest.raises(TransientError):
        sandbox.exec(["x"]).wait()


async def test_the_same_on_asyncio() -> None:
    link = AsyncConnection(ENDPOINT, transport=httpx.MockTransport(sandbox_answers(lines(STARTED, OUTPUT, ENDED))))
    async with link:
        sandbox = await AsyncSandbox.connect("box", connection=link)
        execution = await sandbox.exec(["x"])
        assert execution.pid == 5
        assert [event async for event in execution][-1] == ProcessEnded(3, "exit status 3")
        assert (await execution.wait()).exit_code == 3


def test_a_sandbox_that_failed_is_an_error_with_its_reason() -> None:
    failed = SANDBOX | {
        "state": "failed",
        "failure": {"code": "vmm_failed", "message": "no kernel", "hint": "build the image"},
        "console_tail": "panic",
    }
    with pytest.raises(SandboxFailedError) as caught:
        Sandbox.create(connection=connection(lambda _: httpx.Response(201, json=failed)))
    assert (caught.value.code, caught.value.hint) == ("vmm_failed", "build the image")
    assert "no kernel" in caught.value.message
    assert caught.value.details.console_tail == "panic"


def test_a_slow_creation_is_asked_for_again_until_it_runs() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        state = "creating" if len(seen) < 3 else "running"
        return httpx.Response(202, json=SANDBOX | {"state": state})

    sandbox = Sandbox.create(connection=connection(answer))
    assert sandbox.state == "running"
    assert seen == ["POST", "GET", "GET"]


def test_an_interrupted_creation_is_taken_back_unless_the_user_named_it() -> None:
    removed: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            removed.append(request.url.path)
            return httpx.Response(202)
        names.append(json.loads(request.content)["name"])
        raise KeyboardInterrupt

    names: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Sandbox.create(connection=connection(answer))
    assert removed == [f"/api/v1/sandboxes/{names[0]}"]
    with pytest.raises(KeyboardInterrupt):
        Sandbox.create(name="mine", connection=connection(answer))
    assert len(removed) == 1


def test_the_block_destroys_what_it_created_and_nothing_else() -> None:
    requests: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request.method)
        if request.method == "DELETE":
            return httpx.Response(204)
        return httpx.Response(201, json=SANDBOX)

    with pytest.raises(ZeroDivisionError), Sandbox.create(connection=connection(answer)):
        raise ZeroDivisionError
    assert requests == ["POST", "DELETE"]
    with Sandbox.connect("box", connection=connection(answer)):
        pass
    assert requests == ["POST", "DELETE", "GET"]


def test_destroying_what_is_gone_is_fine_and_what_stays_is_said() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            return httpx.Response(404, json={"code": "sandbox_not_found", "message": "no"})
        return httpx.Response(200, json=SANDBOX)

    Sandbox.connect("box", connection=connection(gone)).destroy()

    def stays(request: httpx.Request) -> httpx.Response:
        return httpx.Response(202) if request.method == "DELETE" else httpx.Response(200, json=SANDBOX)

    with pytest.raises(TimeoutExceededError):
        Sandbox.connect("box", connection=connection(stays)).destroy()


def test_lists_are_read_page_by_page() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.params.get("cursor") == "two":
            return httpx.Response(200, json={"items": [SANDBOX | {"name": "b"}]})
        assert request.url.params.get_list("label") == ["a=1"]
        return httpx.Response(200, json={"items": [SANDBOX], "next_cursor": "two"})

    assert [each.name for each in Sandbox.list(labels={"a": "1"}, connection=connection(answer))] == ["box", "b"]


def test_events_go_on_behind_the_last_one_after_a_break() -> None:
    asked: list[str | None] = []

    def event(number: int) -> bytes:
        body = {"id": number, "at": "2024-01-01T00:00:00Z", "kind": "k", "payload": {}}
        return f"id: {number}\ndata: {json.dumps(body)}\n\n".encode()

    class Broken(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield event(1)
            yield event(2)[:10]
            raise httpx.ReadError("broken")

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("last-event-id"))
        return httpx.Response(200, stream=Broken()) if len(asked) == 1 else httpx.Response(200, content=event(2))

    stream = follow_events(connection(answer))
    assert [next(stream).id, next(stream).id] == [1, 2]
    stream.close()
    assert asked == [None, "1"]


def test_a_large_file_is_sent_with_its_length_and_in_pieces() -> None:
    import io

    seen: list[httpx.Request] = []
    entry = {
        "name": "f", "path": "/f", "type": "file", "size_bytes": 1, "mode": 420, "owner": "u", "group": "g",
        "modified_at": "2024-01-01T00:00:00Z",
    }  # fmt: skip

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        request.read()
        return httpx.Response(200, json=SANDBOX if request.method == "GET" else entry)

    sandbox = Sandbox.connect("box", connection=connection(answer))
    sandbox.files.write("f", io.BytesIO(b"x" * 700_000))
    sandbox.files.write("f", iter([b"a", b"b"]))
    assert seen[1].content == b"x" * 700_000
    assert seen[2].content == b"ab"
    assert seen[2].headers["transfer-encoding"] == "chunked"
