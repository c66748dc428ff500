"""What only the host may ask: ``/init`` (who the guest is), and of ``atelier.v1.Control`` SetClock, Quiesce, Thaw, Shutdown.

Registered by ``program`` for the guest channel; never for a listener, unless in development. ``/init`` has E2B's
fields (accessToken, envVars, timestamp, defaultUser, defaultWorkdir) and ours (hostname, machineId, hostKey, entropy in
base64, hostTimeNs, network, macAddress, generation, restored). A field that is absent changes nothing; all are checked
before the first takes effect. With ``restored`` the machine comes from a snapshot: its disk takes writes again, the tools
image is mounted if it is not, the clock only goes forward, and the owner's hooks are run; its processes stand still until
Thaw. SetClock answers timeNs, the guest's clock, and takes offsetNs, by which that is ahead of the host's (``clock``).
All of them are served while the guest is quiesced.
"""

from __future__ import annotations

import time
from binascii import Error as BinasciiError
from binascii import a2b_base64
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, cast

from atelier.guest_agent.http import UNARY, Request, Response, Router
from atelier.guest_agent.rpc import Message, add_unary
from atelier.guest_agent.state import AgentState
from atelier.guest_protocol.connect import ConnectError, decode_json

if TYPE_CHECKING:
    from atelier.guest_agent.identity import HostKey
    from atelier.guest_agent.network import NetworkSettings
    from atelier.guest_agent.quiesce import Quiesce

MAX_INIT_BYTES: Final = 1024 * 1024

_MAX_ENTROPY_BYTES: Final = 4096
_FOR_RESTORE: Final = ("clock", "identity", "network", "restore_hooks", "tools_disk")
_HEX: Final = frozenset("0123456789abcdef")
_GENERATION: Final = _HEX | {"-"}
_LABEL: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")


class Identity:
    """A checked ``/init`` request. None: the field was absent."""

    def __init__(self, message: Message) -> None:
        self.token = _text(message, "accessToken")
        self.default_user = _text(message, "defaultUser")
        self.default_directory = _text(message, "defaultWorkdir")
        self.hostname = _text(message, "hostname")
        self.machine_id = _text(message, "machineId")
        self.environment = _environment(message.get("envVars"))
        self.entropy = _entropy(_text(message, "entropy"))
        self.time_ns = _time_ns(message)
        self.network = _network(message.get("network"))
        self.mac_address = _mac_address(_text(message, "macAddress"))
        self.host_key = _host_key(message.get("hostKey"))
        self.generation = _text(message, "generation")
        self.is_restored = _flag(message, "restored")
        if self.hostname is not None and not (
            1 <= len(self.hostname) <= 63 and _LABEL.issuperset(self.hostname) and self.hostname[0] not in "-."
        ):
            raise ConnectError("invalid_argument", "hostname must be 1 to 63 letters, digits, hyphens or dots")
        if self.machine_id is not None and not (len(self.machine_id) == 32 and _HEX.issuperset(self.machine_id)):
            raise ConnectError("invalid_argument", "machineId must be 32 lower-case hexadecimal digits")
        if self.host_key is not None and self.machine_id is None:
            raise ConnectError("invalid_argument", "hostKey needs machineId, which says whose it is")
        if self.generation is not None and not (
            1 <= len(self.generation) <= 64 and _GENERATION.issuperset(self.generation)
        ):
            raise ConnectError(
                "invalid_argument", "generation must be 1 to 64 lower-case hexadecimal digits or hyphens"
            )


def register(router: Router, state: AgentState) -> None:
    quiesce: Quiesce | None = None

    def get_quiesce() -> Quiesce:
        nonlocal quiesce
        if quiesce is None:
            from atelier.guest_agent.quiesce import Quiesce

            quiesce = Quiesce(state.gate, touches_system=state.touches_system)
        return quiesce

    async def initialize(request: Request) -> Response:
        identity = Identity(decode_json(await request.read(MAX_INIT_BYTES)))
        if state.touches_system:
            _apply(identity)
        if identity.environment is not None:
            state.environment = identity.environment
        if identity.default_user:
            state.default_user = identity.default_user
        if identity.default_directory is not None:
            state.default_directory = identity.default_directory
        if identity.token is not None:
            state.set_token(identity.token)
        if state.touches_system and identity.is_restored:
            await _tell_owner(identity, state)
        return Response(204, {"cache-control": "no-store"})

    async def quiesce_guest(message: Message, request: Request) -> Message:
        # What a restored guest needs is read now: it may find no tools image then (``tools_disk``).
        router.load_rest()
        for name in _FOR_RESTORE:
            import_module(f"atelier.guest_agent.{name}")
        await get_quiesce().begin()
        return {}

    async def thaw_guest(message: Message, request: Request) -> Message:
        await get_quiesce().end()
        return {}

    async def set_clock(message: Message, request: Request) -> Message:
        time_ns = time.time_ns()
        offset_ns = _offset_ns(message)
        if offset_ns is not None and state.touches_system:
            from atelier.guest_agent import clock

            if state.gate.is_open:
                clock.correct(offset_ns)
            else:
                # It stands still, so that nobody sees the step.
                clock.catch_up(time.time_ns() - offset_ns)
        return {"timeNs": str(time_ns)}

    async def shut_down(message: Message, request: Request) -> Message:
        if not state.touches_system:
            raise ConnectError("failed_precondition", "this agent was told to keep off the system")
        from atelier.guest_agent import shutdown

        shutdown.begin(get_quiesce())
        return {}

    router.add("POST", "/init", initialize, is_still=True, form=UNARY)
    for name, procedure in (
        ("SetClock", set_clock),
        ("Quiesce", quiesce_guest),
        ("Thaw", thaw_guest),
        ("Shutdown", shut_down),
    ):
        add_unary(router, f"/atelier.v1.Control/{name}", procedure, is_still=True)


def _apply(identity: Identity) -> None:
    """Make the guest's system what ``identity`` says. Raises ConnectError."""
    from atelier.guest_agent import identity as system

    # First: until then it is late by all that is done before.
    if identity.time_ns is not None:
        if identity.is_restored:
            from atelier.guest_agent import clock

            clock.catch_up(identity.time_ns)
        else:
            system.set_clock(identity.time_ns)
    if identity.is_restored:
        from atelier.guest_agent import quiesce, tools_disk

        try:
            quiesce.thaw_root()
        except OSError as error:
            raise ConnectError("internal", f"cannot let the disk take writes: {error}") from None
        tools_disk.ensure_mounted()
    if identity.entropy is not None:
        system.add_entropy(identity.entropy)
    if identity.hostname is not None:
        system.set_hostname(identity.hostname)
    if identity.machine_id is not None:
        system.become(identity.machine_id, identity.host_key)
    if identity.network is not None or identity.mac_address is not None:
        from atelier.guest_agent import network

        network.apply(identity.network, identity.mac_address)
    if identity.generation is not None:
        from atelier.guest_agent import restore_hooks

        restore_hooks.write_generation(identity.generation)


async def _tell_owner(identity: Identity, state: AgentState) -> None:
    from atelier.guest_agent import restore_hooks
    from atelier.guest_agent.spawn import DEFAULT_PATH

    await restore_hooks.run_hooks(
        {
            "PATH": DEFAULT_PATH,
            **state.environment,
            "HOME": "/root",
            "USER": "root",
            "LOGNAME": "root",
            "ATELIER_GENERATION": identity.generation or "",
            "ATELIER_HOSTNAME": identity.hostname or "",
            "ATELIER_MACHINE_ID": identity.machine_id or "",
        }
    )


def _text(message: Message, name: str) -> str | None:
    value = message.get(name)
    if value is not None and (not isinstance(value, str) or "\0" in value):
        raise ConnectError("invalid_argument", f"{name} must be text")
    return value


def _environment(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConnectError("invalid_argument", "envVars must be an object")
    variables = cast("dict[str, Any]", value)
    for name, content in variables.items():
        if not isinstance(content, str) or not name or "=" in name or "\0" in name or "\0" in content:
            raise ConnectError("invalid_argument", f"envVars: {name[:100]!r} is no variable with a text")
    return variables


def _network(value: object) -> NetworkSettings | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConnectError("invalid_argument", "network must be an object")
    from atelier.guest_agent.network import NetworkSettings

    return NetworkSettings(cast("dict[str, Any]", value))


def _mac_address(text: str | None) -> bytes | None:
    if text is None:
        return None
    from atelier.guest_agent.network import parse_mac_address

    return parse_mac_address(text)


def _host_key(value: object) -> HostKey | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConnectError("invalid_argument", "hostKey must be an object")
    from atelier.guest_agent.identity import HostKey

    return HostKey(cast("dict[str, Any]", value))


def _flag(message: Message, name: str) -> bool | None:
    value = message.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConnectError("invalid_argument", f"{name} must be true or false")
    return value


def _entropy(encoded: str | None) -> bytes | None:
    if encoded is None:
        return None
    try:
        entropy = a2b_base64(encoded, strict_mode=True)
    except (BinasciiError, ValueError):
        raise ConnectError("invalid_argument", "entropy is no base64") from None
    if not 0 < len(entropy) <= _MAX_ENTROPY_BYTES:
        raise ConnectError("invalid_argument", f"entropy must be 1 to {_MAX_ENTROPY_BYTES} bytes")
    return entropy


def _offset_ns(message: Message) -> int | None:
    text = _text(message, "offsetNs")
    if text is None:
        return None
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 19):
        raise ConnectError("invalid_argument", "offsetNs must be nanoseconds, as a text")
    return int(text)


def _time_ns(message: Message) -> int | None:
    """hostTimeNs (a number, or its text: it is an int64), else E2B's timestamp (RFC 3339)."""
    value: object = message.get("hostTimeNs")
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 19:
        value = int(value)
    if value is None:
        timestamp = _text(message, "timestamp")
        if timestamp is None:
            return None
        from datetime import datetime

        try:
            moment = datetime.fromisoformat(timestamp)
        except ValueError:
            raise ConnectError("invalid_argument", "timestamp is no RFC 3339 time") from None
        if moment.tzinfo is None:
            raise ConnectError("invalid_argument", "timestamp needs a time zone")
        value = round(moment.timestamp() * 1_000_000) * 1000
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise ConnectError("invalid_argument", "hostTimeNs must be nanoseconds since the epoch")
    return value
