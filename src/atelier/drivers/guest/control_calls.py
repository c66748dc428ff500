"""What the host asks of a guest as a whole: is it there, who it is, what time it is, and that it stops.

Used by ``agent``. The guest's side is ``guest_agent.control``. What a guest answers decides about itself only.
"""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Final

from atelier.drivers.guest.guest_http import GuestHttp
from atelier.drivers.guest.messages import clock_offset_ns
from atelier.guest_protocol import connect
from atelier.model.errors import AtelierError, GuestError, TimeoutExceededError, TransientError
from atelier.model.guest import GuestIdentity

_READY_PAUSE_SECONDS: Final = 0.025
_READY_OVERLAP_SECONDS: Final = 0.25
_READY_ATTEMPT_SECONDS: Final = 5.0
_READY_ATTEMPTS_MAX: Final = 4
_ROUND_TRIPS: Final = 3

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
        await _ask_for_health(guest, _READY_ATTEMPT_SECONDS)
    except (TransientError, GuestError) as error:
        return error
    return None


async def _ask_for_health(guest: GuestHttp, limit_seconds: float) -> None:
    await guest.ask(
        "asking for health",
        "GET",
        "/health",
        expected=(200, 204),
        answer_seconds=limit_seconds,
        connect_seconds=limit_seconds,
    )


async def initialize(guest: GuestHttp, identity: GuestIdentity) -> None:
    await guest.ask(
        "initializing the guest",
        "POST",
        "/init",
        headers={"content-type": connect.CONTENT_TYPE_UNARY},
        body=connect.encode_json(
            {
                "hostname": identity.hostname,
                "machineId": identity.machine_id,
                "accessToken": identity.token,
                "entropy": base64.b64encode(identity.entropy).decode(),
                "hostTimeNs": str(identity.host_time_ns),
                "envVars": identity.environment,
            }
        ),
        expected=(200, 204),
    )
    guest.token = identity.token


async def synchronize_clock(guest: GuestHttp) -> float:
    """The host's time arrives in the guest half a round trip after it was read, so that much is added. The shortest of
    a few counts: what is longer waited for something."""
    round_trips_ns: list[int] = []
    for _ in range(_ROUND_TRIPS):
        begun_ns = time.monotonic_ns()
        await _ask_for_health(guest, _READY_ATTEMPT_SECONDS)
        round_trips_ns.append(time.monotonic_ns() - begun_ns)
    host_time_ns = time.time_ns() + min(round_trips_ns) // 2
    answer = await guest.call(
        "setting the clock", _CONTROL + "SetClock", {"hostTimeNs": str(host_time_ns)}, absent="not_found"
    )
    return clock_offset_ns(answer) / 1e9


async def shut_down(guest: GuestHttp) -> None:
    # A second request changes nothing, so it may be repeated on a new connection.
    await guest.call("shutting down", _CONTROL + "Shutdown", {}, absent="not_found", is_question=True)
