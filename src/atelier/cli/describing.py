"""A sandbox in words for people: its state with the reason, its time limits, its network, what is the matter with it.

Called by ``ls``, ``get``, ``network`` and the commands that change a sandbox. What it returns is not escaped yet.
"""

from __future__ import annotations

from datetime import UTC, datetime

from atelier.cli.output import show_age, show_bytes, show_duration
from atelier.client.sandbox_failures import is_stuck
from atelier.model.network_policy import EgressMode
from atelier.model.states import SandboxState, StopReason
from atelier.schemas.networks import NetworkPolicy, SandboxNetwork
from atelier.schemas.sandboxes import Sandbox

_STOP_REASONS = {StopReason.FORCED: "cut off", StopReason.IDLE: "idle"}
CUT_OFF = "cut off: its guest did not shut down in time; what it had not written to its disk is lost"


def show_state(sandbox: Sandbox) -> str:
    """``running``, ``stopped (idle)``, ``stopping (stuck)``."""
    remark = "stuck" if is_stuck(sandbox) else _STOP_REASONS.get(sandbox.stop_reason) if sandbox.stop_reason else None
    return f"{sandbox.state} ({remark})" if remark else str(sandbox.state)


def note_cut_off(sandbox: Sandbox) -> str:
    return CUT_OFF if sandbox.stop_reason is StopReason.FORCED else ""


def show_expiry(expires_at: datetime | None, now: datetime | None = None) -> str:
    """``expires in 1h 20m``; empty: never."""
    if expires_at is None:
        return ""
    seconds = (expires_at - (now or datetime.now(UTC))).total_seconds()
    return f"expires in {show_duration(round(seconds))}" if seconds > 0 else "has expired"


def show_idle_limit(seconds: int | None) -> str:
    return "" if seconds is None else f"stops when idle for {show_duration(seconds)}"


def show_limits(sandbox: Sandbox) -> str:
    """Both limits; empty: none."""
    limits = (show_expiry(sandbox.expires_at), show_idle_limit(sandbox.auto_stop_after_idle_seconds))
    return ", ".join(limit for limit in limits if limit)


def show_last_use(sandbox: Sandbox) -> str:
    if sandbox.auto_stop_after_idle_seconds is None or sandbox.last_active_at is None:
        return ""
    return f"{show_age(sandbox.last_active_at)} ago"


def list_trouble(sandbox: Sandbox) -> list[tuple[str, str]]:
    """What is the matter, and the remedy: pairs of label and text."""
    failure = sandbox.failure
    if failure is None:
        return []
    label = "failed" if sandbox.state is SandboxState.FAILED else "trouble"
    found = [(label, f"{failure.message} [{failure.code}]")]
    return [*found, ("hint", failure.hint)] if failure.hint else found


def show_rate(kbit_per_second: int) -> str:
    """``10mbit``, ``1.5mbit``, ``512kbit``: as the commands take it."""
    for factor, unit in ((1_000_000, "gbit"), (1000, "mbit")):
        if kbit_per_second >= factor:
            return f"{kbit_per_second / factor:.6f}".rstrip("0").rstrip(".") + unit
    return f"{kbit_per_second}kbit"


def show_egress(policy: NetworkPolicy) -> str:
    """``all``, ``none``, ``list (github.com, 10.1.0.0/16)``; long lists as their length."""
    egress = policy.egress
    entries = [*egress.domains, *egress.networks]
    if egress.mode is EgressMode.NONE or (egress.mode is EgressMode.ALL and not entries):
        return egress.mode.value
    shown = ", ".join(entries) if len(entries) <= 3 else f"{len(entries)} entries"
    return f"{egress.mode.value} and {shown}" if egress.mode is EgressMode.ALL else f"list ({shown or 'empty'})"


def show_rates(policy: NetworkPolicy) -> str:
    """Both rates; empty: not limited."""
    rates = (("download", policy.download_kbit_per_second), ("upload", policy.upload_kbit_per_second))
    return ", ".join(f"{label} {show_rate(rate)}" for label, rate in rates if rate is not None)


def describe_network(network: SandboxNetwork) -> list[tuple[str, str]]:
    """All that there is to say, entry by entry: pairs of label and text."""
    policy, usage = network.policy, network.usage
    entries = [*policy.egress.domains, *policy.egress.networks]
    fields = [
        ("egress", policy.egress.mode.value),
        *(("" if place else "allowed", entry) for place, entry in enumerate(entries)),
        ("limits", show_rates(policy)),
        ("address", network.address or ""),
        ("gateway", network.gateway or ""),
    ]
    if not network.connected:
        fields.append(("connected", f"no: {network.not_connected_reason}"))
    if not network.in_force:
        fields.append(("in force", "not yet: it is tried again until it is"))
    if usage is not None:
        fields += [
            ("received", f"{show_bytes(usage.received_bytes)} in {usage.received_packets} packets"),
            ("sent", f"{show_bytes(usage.sent_bytes)} in {usage.sent_packets} packets"),
            ("refused", f"{usage.refused_packets} packets"),
        ]
    return fields
