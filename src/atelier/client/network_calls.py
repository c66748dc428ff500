"""The routes for a sandbox's network: what is sent, and how the answer is read. Without I/O.

``sandbox_life.py`` gives them to people, ``cli/commands/network.py`` to the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from atelier.client.call import KEEP, Call, Keep, make_body, make_patch, read_model, sandbox_path
from atelier.client.errors import invalid_arguments
from atelier.model.network_policy import EgressMode
from atelier.schemas.networks import ChangeNetworkRequest, NetworkPolicy, SandboxNetwork

PolicyWish = NetworkPolicy | Mapping[str, Any]
"""A policy, or the same as the API has it: ``{"egress": {"mode": "list", "domains": ["github.com"]}}``."""


def get_network(sandbox: str) -> Call[SandboxNetwork]:
    operation = f"look up the network of {sandbox}"
    return Call(operation, "GET", _path(sandbox), read_model(SandboxNetwork, operation), repeatable=True)


def set_network(sandbox: str, policy: PolicyWish) -> Call[SandboxNetwork]:
    operation = f"set the network policy of {sandbox}"
    body = make_body(NetworkPolicy, operation, **dict(to_policy(policy, operation)))
    return Call(operation, "PUT", _path(sandbox), read_model(SandboxNetwork, operation), body, repeatable=True)


def change_network(
    sandbox: str,
    *,
    allow: Sequence[str] = (),
    deny: Sequence[str] = (),
    egress_mode: EgressMode | str | None = None,
    download_kbit_per_second: int | Keep | None = KEEP,
    upload_kbit_per_second: int | Keep | None = KEEP,
) -> Call[SandboxNetwork]:
    """None lifts a rate."""
    operation = f"change the network of {sandbox}"
    wishes: dict[str, Any] = {
        "egress_mode": KEEP if egress_mode is None else egress_mode,
        "deny": list(deny) or KEEP,
        "allow": list(allow) or KEEP,
        "download_kbit_per_second": download_kbit_per_second,
        "upload_kbit_per_second": upload_kbit_per_second,
    }
    given = {name: value for name, value in wishes.items() if value is not KEEP}
    body = make_patch(ChangeNetworkRequest, operation, **given)
    return Call(operation, "PATCH", _path(sandbox), read_model(SandboxNetwork, operation), body)


def to_policy(policy: PolicyWish, operation: str) -> NetworkPolicy:
    """Raises InvalidRequestError for what has not the form of a policy."""
    if isinstance(policy, NetworkPolicy):
        return policy
    try:
        return NetworkPolicy.model_validate(dict(policy))
    except ValidationError as error:
        raise invalid_arguments(operation, error) from error


def _path(sandbox: str) -> str:
    return sandbox_path(sandbox, "/network")
