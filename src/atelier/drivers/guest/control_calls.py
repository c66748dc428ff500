"""What the host asks of a guest as a whole: is it there, who it is, what time it is, that it stands still or stops.

Used by ``agent``. The guest's side is ``guest_agent.control``. What a guest answers decides about itself only.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from atelier.drivers.guest.guest_http import GuestHttp
from atelier.drivers.guest.messages import GAVE_UP, Message, clock_time_ns
from atelier.guest_protocol import connect
from atelier.model.errors import AtelierError, GuestError, TimeoutExceededError, TransientError
from atelier.model.guest import GuestIdentity

_READY_PAUSE_SECONDS: Final = 0.025
_READY_OVERLAP_SECONDS: Final = 0.25
_READY_ATTEMPT_SECONDS: Final = 5.0
_READY_ATTEMPTS_MAX: Final = 4
_CLOCK_READINGS: Final = 4
_CLOCK_LATE_SECONDS: Final = 0.03

_CONTROL: Final = "atelier.v1.Control/"


async def wait_ready(guest: GuestHttp, sandbox_id: str, timeout_seconds: float) -> None:
    # While a guest boots, the gateway may hold an attempt until the guest is there, refuse it at once, or lose it
    # in a guest that starts anew. So one attempt waits, and a further one is begun beside it when it takes long.
    attempts: set[asyncio.Task[AtelierError | None]] = set()
    failure: AtelierError | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                if len(attempts) < _READY_ATTEMPTS_MAX:
                    attempts.add(asyncio.create_task(_is_healthy(guest)))
                done, attempts = await asyncio.wait(
                    attempts, timeout=_READY_OVERLAP_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                for attempt in done:
                    failure = attempt.result()
                    if failure is None:
                        return
                if done:
                    await asyncio.sleep(_READY_PAUSE_SECONDS)
    except TimeoutError as error:
        reason = f": {failure.message}" if failure is not None else ""
        raise TimeoutExceededError(
            f"the guest agent of sandbox {sandbox_id} did not answer within {timeout_seconds:g} s{reason}",
            code="guest_not_ready",
            hint="its console shows how far it came",
        ) from error
    finally:
        for attempt in attempts:
            attempt.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)


async def _is_healthy(guest: GuestHttp) -> AtelierError | None:
    """None when the guest agent answers, else why not."""
    try:
        await guest.ask(
            "asking for health",
            "GET",
            "/health",
            expected=(200, 204),
            answer_seconds=_READY_ATTEMPT_SECONDS,
            connect_seconds=_READY_ATTEMPT_SECONDS,
        )
    except (TransientError, GuestError) as error:
        return error
    return None


def _identity_fields(identity: GuestIdentity) -> Message:
    fields: Message = {
        "hostname": identity.hostname,
        "machineId": identity.machine_id,
        "accessToken": identity.token,
        "entropy": base64.b64encode(identity.entropy).decode(),
        "hostTimeNs": str(identity.host_time_ns),
        "envVars": identity.environment,
        "restored": identity.restored,
    }
    if (network := identity.network) is not None:
        fields["network"] = {
            "address": network.address,
            "prefixLength": network.prefix_length,
            "gateway": network.gateway,
            "nameserver": network.nameserver,
        }
    if (key := identity.host_key) is not None:
        fields["hostKey"] = {"privateKey": key.private_key, "publicKey": key.public_key}
    if identity.mac_address:
        fields["macAddress"] = identity.mac_address
    if identity.generation:
        fields["generation"] = identity.generation
    return fields


async def initialize(guest: GuestHttp, identity: GuestIdentity) -> None:
    begun = time.monotonic()
    with _renamed(
        "restore_hook_failed", "mend the hook in the sandbox that the snapshot was made of, and snapshot it anew"
    ):
        await _initialize(guest, "initializing the guest", _identity_fields(identity))
    guest.token = identity.token
    if identity.restored and time.monotonic() - begun > _CLOCK_LATE_SECONDS:
        # The time may have been late by as much when the guest read it; nothing of its own has seen that so far.
        await synchronize_clock(guest)


async def rename(guest: GuestHttp, hostname: str, environment: dict[str, str]) -> None:
    """The guest agent leaves alone what it is not told."""
    await _initialize(guest, "renaming the guest", {"hostname": hostname, "envVars": environment})


async def _initialize(guest: GuestHttp, doing: str, fields: Message) -> None:
    await guest.ask(
        doing,
        "POST",
        "/init",
        headers={"content-type": connect.CONTENT_TYPE_UNARY},
        body=connect.encode_json(fields),
        expected=(200, 204),
    )


async def quiesce(guest: GuestHttp) -> None:
    # It and its opposite change nothing when they are asked twice, so they may be repeated on a new connection.
    with _renamed("quiesce_failed", "see what keeps the guest busy, and try again"):
        await guest.call("quiescing", _CONTROL + "Quiesce", {}, absent="not_found", is_question=True)


async def thaw(guest: GuestHttp) -> None:
    await guest.call("thawing", _CONTROL + "Thaw", {}, absent="not_found", is_question=True)


@contextmanager
def _renamed(code: str, hint: str) -> Generator[None]:
    """An operation that the guest has given up gets a code and a remedy of its own."""
    try:
        yield
    except GuestError as error:
        if error.code != GAVE_UP:
            raise
        raise GuestError(error.message, code=code, hint=hint) from error


async def synchronize_clock(guest: GuestHttp) -> float:
    """The guest's clock is read a few times, each reading taken for one of the middle of its round trip. The shortest
    round trip counts: a longer one waited somewhere on its way. Then the guest is told the difference, not the time,
    so that it does not matter how long that takes."""
    readings = [await _read_clock(guest) for _ in range(_CLOCK_READINGS)]
    _, offset_ns = min(readings)
    await _call_set_clock(guest, {"offsetNs": str(offset_ns)})
    return offset_ns / 1e9


async def _read_clock(guest: GuestHttp) -> tuple[int, int]:
    """(round trip, guest's clock minus the host's), both in ns."""
    host_time_ns, begun_ns = time.time_ns(), time.monotonic_ns()
    guest_time_ns = clock_time_ns(await _call_set_clock(guest, {}))
    round_trip_ns = time.monotonic_ns() - begun_ns
    return round_trip_ns, guest_time_ns - (host_time_ns + round_trip_ns // 2)


async def _call_set_clock(guest: GuestHttp, message: Message) -> Message:
    return await guest.call("setting the clock", _CONTROL + "SetClock", message, absent="not_found")


async def shut_down(guest: GuestHttp) -> None:
    # A second request changes nothing, so it may be repeated on a new connection.
    await guest.call("shutting down", _CONTROL + "Shutdown", {}, absent="not_found", is_question=True)
