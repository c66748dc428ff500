"""The simplest client that can speak with the guest agent of a bare machine: one blocking socket, one stream at a time.

It uses the multiplexer of ``atelier.guest_protocol`` straight on the VMM's socket: no gateway, no manager.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

from atelier.guest_protocol import GUEST_AGENT_PORT, PROTOCOL_VERSION
from atelier.guest_protocol.frames import (
    HELLO,
    HELLO_ACK,
    KNOCK,
    MAX_FRAME_BYTES,
    NO_NONCE,
    NONCE_BYTES,
    PADDING,
    Greeting,
    encode_greeting,
)
from atelier.guest_protocol.multiplexer import Multiplexer
from atelier.guest_protocol.stream import Stream


class DirectChannel:
    """Connects at once; ``run`` waits for the guest by itself."""

    def __init__(self, socket_path: Path, token: str, timeout_seconds: float = 300.0) -> None:
        self._deadline = time.monotonic() + timeout_seconds
        self._token = token
        self._nonce = os.urandom(NONCE_BYTES)
        self._received = bytearray()
        self._closed = False
        self._stream: Stream | None = None
        self._multiplexer = Multiplexer(on_output=lambda: None, on_greeting=self._greeted)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(socket_path))
        self._socket.setblocking(False)
        self._say_hello(NO_NONCE)

    def close(self) -> None:
        self._socket.close()

    def ask(self, path: str, message: object) -> None:
        """One question in JSON, answered well."""
        body = json.dumps(message).encode()
        self._post(path, "application/json", body)
        self._turn_until(lambda: b"\r\n\r\n" in self._received or self._closed)
        answer = bytes(self._received)
        if answer.split(b" ", 2)[1:2] not in ([b"200"], [b"204"]):
            raise RuntimeError(f"{path}: {answer[-2000:].decode(errors='replace')}")
        assert self._stream is not None
        self._stream.close()

    def _post(self, path: str, content_type: str, body: bytes, credentials: str = "") -> None:
        self._turn_until(lambda: self._multiplexer.epoch != 0)
        self._received.clear()
        self._closed = False
        self._stream = self._multiplexer.open(GUEST_AGENT_PORT, self)
        assert self._stream is not None
        head = (
            f"POST {path} HTTP/1.1\r\nHost: guest\r\nContent-Type: {content_type}\r\n{credentials}"
            f"X-Access-Token: {self._token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._stream.send(head.encode() + body)

    def run(self, *command: str, user: str = "user", background: bool = False) -> None:
        """Start a program through the agent and return when it has exited with 0 (or, ``background``, has started)."""
        message = json.dumps({"process": {"cmd": command[0], "args": list(command[1:])}, "stdin": False}).encode()
        body = bytes(1) + len(message).to_bytes(4, "big") + message
        basic = {"user": "dXNlcjo=", "root": "cm9vdDo="}[user]
        credentials = f"Authorization: Basic {basic}\r\n"
        self._post("/process.Process/Start", "application/connect+json", body, credentials)
        wanted = b'"pid"' if background else b'"end"'
        self._turn_until(lambda: wanted in self._received or self._closed)
        # Zero values are left out of protobuf's JSON, so success is the absence of an exit code.
        answer = bytes(self._received)
        if b" 200 " not in answer.split(b"\r\n", 1)[0] or wanted not in answer or b'"error"' in answer:
            raise RuntimeError(f"{command}: {answer[-2000:].decode(errors='replace')}")
        if not background:
            self._stream.close()

    # StreamEnd.

    def opened(self) -> None:
        pass

    def received(self, payload: memoryview) -> None:
        self._received += payload
        if self._stream is not None:
            self._stream.consumed(len(payload))

    def received_end(self) -> None:
        self._closed = True

    def closed(self, reason: int) -> None:
        self._closed = True

    def may_send(self) -> None:
        pass

    # The port.

    def _say_hello(self, echo: bytes) -> None:
        self._multiplexer.put_raw(PADDING)
        self._multiplexer.put_raw(
            encode_greeting(Greeting(HELLO, PROTOCOL_VERSION, self._nonce, echo, self._token)),
        )

    def _greeted(self, greeting: Greeting) -> None:
        if greeting.kind == KNOCK:
            self._multiplexer.end_epoch()
            self._nonce = os.urandom(NONCE_BYTES)
            self._say_hello(greeting.nonce)
        elif greeting.kind == HELLO_ACK and greeting.nonce == self._nonce:
            self._multiplexer.begin_epoch(self._nonce)

    def _turn_until(self, done: Callable[[], bool]) -> None:
        while not done():
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the guest agent did not answer")
            pieces = self._multiplexer.next_pieces()
            readable, writable, _ = select.select([self._socket], [self._socket] if pieces else [], [], left)
            if writable and pieces:
                self._multiplexer.wrote(self._socket.sendmsg(pieces))
                self._multiplexer.offer_room()
            if readable:
                count = self._socket.recv_into(self._multiplexer.receive_buffer.space(), MAX_FRAME_BYTES)
                if count == 0:
                    raise RuntimeError("the VMM closed the channel")
                self._multiplexer.receive_buffer.received(count)
                self._multiplexer.process()
