"""Each sandbox on a port of a bridge, with the internet and nothing else: the network holder's client.

Chosen by ``manager.wiring``. All that touches the kernel is done by the network holder, a process of its own that
outlives the manager; here are the driver's interface, and one connection per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from atelier.drivers.network.addresses import mac_address_of
from atelier.model.address_plan import SLOT_COUNT
from atelier.model.errors import AtelierError, ConflictError, HostError, NotFoundError, TransientError
from atelier.model.machine import GuestAddress, NetworkAttachment
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy, NetworkUsage

_TIMEOUT_SECONDS = 15.0
_ANSWER_MAX_BYTES = 4 * 1024 * 1024
_ERRORS = {
    "lease_taken": ConflictError,
    "slot_in_use": ConflictError,
    "slot_name_taken": ConflictError,
    "no_network_slot": NotFoundError,
}


class BridgeNetwork:
    """``socket_path``: the network holder's."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        self._leaving: dict[str, asyncio.Future[AtelierError | None]] = {}
        self._freeing: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return "bridge"

    @property
    def attachment_kind(self) -> str:
        return "tap"

    @property
    def slot_count(self) -> int | None:
        return SLOT_COUNT

    @property
    def enforces_policies(self) -> bool:
        return True

    async def ensure_slot(self, sandbox_id: str, lease: int, policy: NetworkPolicy = OPEN_POLICY) -> NetworkAttachment:
        """Raises TransientError (``network_holder_unreachable``), ConflictError, HostError."""
        mac_address = mac_address_of(sandbox_id)
        what = f"taking network slot {lease} for {sandbox_id}"
        answer, _ = await self._ask(
            what,
            operation="ensure_slot",
            sandbox_id=sandbox_id,
            lease=lease,
            mac_address=mac_address,
            policy=policy.to_json(),
        )
        # Absent in the answer of an older holder.
        name = str(answer.get("device_name", ""))
        return NetworkAttachment("tap", mac_address, _guest_address(answer, what), name)

    async def ensure_slot_absent(self, sandbox_id: str) -> None:
        """Those that are freed at the same time are freed by one request: together they take little longer than one."""
        answer = self._leaving.setdefault(sandbox_id, asyncio.get_running_loop().create_future())
        if self._freeing is None or self._freeing.done():
            self._freeing = asyncio.create_task(self._free_leaving())
        if (error := await asyncio.shield(answer)) is not None:
            raise error

    async def _free_leaving(self) -> None:
        while self._leaving:
            asked, self._leaving = self._leaving, {}
            what = "freeing network slots"
            failed: dict[str, AtelierError] = {}
            try:
                reply, _ = await self._ask(what, operation="ensure_slots_absent", sandbox_ids=list(asked))
                for sandbox_id, refusal in cast("dict[str, dict[str, Any]]", reply["failed"]).items():
                    failed[sandbox_id] = _refusal(refusal, f"freeing the network slot of {sandbox_id}")
            except AtelierError as error:
                failed = dict.fromkeys(asked, error)
            except (KeyError, AttributeError, TypeError):
                failed = dict.fromkeys(asked, HostError(f"{what}: the network holder's answer tells of no slots"))
            for sandbox_id, answer in asked.items():
                answer.set_result(failed.get(sandbox_id))

    async def set_policy(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        what = f"setting the network policy of {sandbox_id}"
        await self._ask(what, operation="set_policy", sandbox_id=sandbox_id, policy=policy.to_json())

    async def read_usage(self) -> dict[str, NetworkUsage]:
        what = "reading the network usage"
        usage = (await self._ask(what, operation="read_usage"))[0].get("usage")
        try:
            return {
                sandbox_id: NetworkUsage(**each)
                for sandbox_id, each in cast("dict[str, dict[str, int]]", usage).items()
            }
        except (AttributeError, TypeError) as error:
            raise HostError(f"{what}: the network holder's answer holds no usage") from error

    @asynccontextmanager
    async def opened(self, sandbox_id: str) -> AsyncGenerator[int | None]:
        """Raises ConflictError (``slot_in_use``) while another machine holds it."""
        what = f"opening the TAP of {sandbox_id}"
        _, descriptors = await self._ask(what, operation="open_slot", sandbox_id=sandbox_id)
        try:
            if len(descriptors) != 1:
                raise HostError(f"{what}: the network holder sent {len(descriptors)} descriptors")
            yield descriptors[0]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def list_slots(self) -> list[str]:
        slots = (await self._ask("listing the network slots", operation="list_slots"))[0].get("slots")
        return sorted(each for each in cast("list[object]", slots) if isinstance(each, str))

    async def _ask(self, what: str, **request: object) -> tuple[dict[str, Any], list[int]]:
        """(answer, descriptors that came with it, which are the caller's to close)."""
        line, descriptors = await self._exchange(what, json.dumps(request).encode() + b"\n")
        try:
            return _checked(line, what), descriptors
        except BaseException:
            _close_all(descriptors)
            raise

    async def _exchange(self, what: str, request: bytes) -> tuple[bytes, list[int]]:
        """As ``_ask``."""
        line = b""
        descriptors: list[int] = []
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.setblocking(False)
                async with asyncio.timeout(_TIMEOUT_SECONDS):
                    # Never in progress: a unix socket is connected at once, or refused.
                    connection.connect(str(self._socket_path))
                    await asyncio.get_running_loop().sock_sendall(connection, request)
                    while not line.endswith(b"\n") and len(line) < _ANSWER_MAX_BYTES:
                        data, received = await _receive(connection)
                        descriptors += received
                        if not data:
                            raise ConnectionResetError("the network holder closed the connection")
                        line += data
        except OSError as error:
            _close_all(descriptors)
            raise TransientError(
                f"{what}: {str(error) or 'no answer'}",
                code="network_holder_unreachable",
                hint=f"the network holder listens on {self._socket_path}; is it running?",
            ) from error
        except BaseException:
            _close_all(descriptors)
            raise
        return line, descriptors


async def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """What there is, once there is something; (bytes, descriptors). asyncio's own calls take no descriptors."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(connection, 65536, 1, socket.MSG_CMSG_CLOEXEC)
            return data, descriptors
        except BlockingIOError:
            readable = asyncio.Event()
            loop.add_reader(connection, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(connection)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _checked(line: bytes, what: str) -> dict[str, Any]:
    try:
        answer: object = json.loads(line)
    except ValueError as error:
        raise HostError(f"{what}: the network holder's answer is no JSON") from error
    if not isinstance(answer, dict):
        raise HostError(f"{what}: the network holder's answer is no object")
    reply = cast("dict[str, Any]", answer)
    if reply.get("ok") is not True:
        raise _refusal(reply, what)
    return reply


def _refusal(reply: dict[str, Any], what: str) -> AtelierError:
    code = str(reply.get("code") or "host_error")
    message = f"{what}: {reply.get('message', 'the network holder refused')}"
    return _ERRORS.get(code, HostError)(message, code=code, hint=str(reply.get("hint", "")))


def _guest_address(answer: dict[str, Any], what: str) -> GuestAddress:
    try:
        guest = answer["guest"]
        return GuestAddress(
            str(guest["address"]), int(guest["prefix_length"]), str(guest["gateway"]), str(guest["nameserver"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HostError(f"{what}: the network holder's answer holds no address") from error
