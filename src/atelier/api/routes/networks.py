"""A sandbox's network: show it, replace its policy, change it entry by entry."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request

from atelier.api.parameters import SandboxReference, services_of
from atelier.api.rendering import parse_network_policy, render_network
from atelier.model import network_policy as model
from atelier.model.network_policy_edit import edit_egress
from atelier.schemas.networks import ChangeNetworkRequest, NetworkPolicy, SandboxNetwork

router = APIRouter(prefix="/sandboxes/{sandbox}/network", tags=["network"])


@router.get("", operation_id="get_network")
async def get_network(request: Request, sandbox: SandboxReference) -> SandboxNetwork:
    """What a sandbox may reach, its address, and what has passed."""
    return render_network(await services_of(request).networks.get(sandbox))


@router.put("", operation_id="set_network")
async def set_network(request: Request, sandbox: SandboxReference, body: NetworkPolicy) -> SandboxNetwork:
    """Replace the network policy as a whole. Answers when it is in force, for open connections too; of a sandbox without
    a network slot when it is stored. 503 `network_policy_pending`: it is stored, and tried again until it is in force."""
    policy = parse_network_policy(body)
    return render_network(await services_of(request).networks.change(sandbox, lambda _: policy))


@router.patch("", operation_id="change_network")
async def change_network(request: Request, sandbox: SandboxReference, body: ChangeNetworkRequest) -> SandboxNetwork:
    """Allow and deny networks and domains, change the egress mode or the rates. Two such changes at once lose nothing of
    each other's. What is allowed in mode `none` makes a list; in mode `all` only networks can be listed, which opens
    private ones beside the internet. Answers as the replacing of a policy does."""

    def edit(present: model.NetworkPolicy) -> model.NetworkPolicy:
        egress = edit_egress(present.egress, mode=body.egress_mode, deny=body.deny, allow=body.allow)
        changed = replace(present, egress=egress)
        if "download_kbit_per_second" in body.model_fields_set:
            changed = replace(changed, download_kbit_per_second=body.download_kbit_per_second)
        if "upload_kbit_per_second" in body.model_fields_set:
            changed = replace(changed, upload_kbit_per_second=body.upload_kbit_per_second)
        return changed

    return render_network(await services_of(request).networks.change(sandbox, edit))
