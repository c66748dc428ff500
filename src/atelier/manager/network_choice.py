"""Which network the sandboxes of mode ``local`` have, and what keeps them from a better one. Called by ``wiring``,
``doctor``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from atelier.config.settings import NetworkChoice
from atelier.host.checks.local import CheckResult, CheckStatus
from atelier.host.checks.network import check_bridge_network

logger = logging.getLogger(__name__)

Check = Callable[[], list[CheckResult]]


@dataclass(frozen=True, slots=True)
class ChosenNetwork:
    """``missing``: why sandboxes have no way out although nobody has asked for that, with the remedy; else empty."""

    bridged: bool
    missing: str = ""


def choose_network(choice: NetworkChoice, check: Check = check_bridge_network) -> ChosenNetwork:
    match choice:
        case NetworkChoice.BRIDGE:
            return ChosenNetwork(bridged=True)
        case NetworkChoice.CLOSED:
            return ChosenNetwork(bridged=False)
        case NetworkChoice.AUTO:
            failed = [result for result in check() if result.status is CheckStatus.FAILED]
            if not failed:
                return ChosenNetwork(bridged=True)
            missing = "; ".join(f"{result.message} ({result.remedy})" for result in failed)
            logger.warning("sandboxes have no network: %s", missing)
            return ChosenNetwork(bridged=False, missing=missing)


def explain_network(choice: NetworkChoice, check: Check = check_bridge_network) -> list[CheckResult]:
    """For the doctor: a failure only where the bridge was insisted on."""
    match choice:
        case NetworkChoice.BRIDGE:
            return check()
        case NetworkChoice.CLOSED:
            message = "sandboxes have no way out: ATELIER_NETWORK is closed"
            return [CheckResult("network", CheckStatus.OK, message)]
        case NetworkChoice.AUTO:
            return [
                replace(result, status=CheckStatus.WARNING, message=f"sandboxes have no way out: {result.message}")
                if result.status is CheckStatus.FAILED
                else result
                for result in check()
            ]
