"""A sandbox's network: what it may reach, how fast, and what has passed."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StrictInt, StringConstraints

from atelier.model.network_policy import MAX_ENTRIES, MAX_RATE_KBIT, MIN_RATE_KBIT, EgressMode
from atelier.schemas.request_body import RequestBody

Entry = Annotated[str, StringConstraints(max_length=1000)]
# Too many are counted by the model, in its words; this bounds what one request can make it read.
Entries = Annotated[list[Entry], Field(default_factory=list[Entry], max_length=10 * MAX_ENTRIES)]
Rate = Annotated[StrictInt, Field(ge=MIN_RATE_KBIT, le=MAX_RATE_KBIT)]


class Egress(RequestBody):
    """``mode``: ``all`` (the internet; private networks only where they are listed), ``list`` (what is listed and nothing
    else) or ``none``. ``networks``: IPv4 in CIDR notation, or single addresses. ``domains``: ``example.com``, or
    ``*.example.com`` for every name below it. At most 1,000 entries."""

    mode: EgressMode
    networks: Entries
    domains: Entries


class NetworkPolicy(RequestBody):
    """Rates in 1,000 bits a second, from the sandbox's view; absent or ``null``: as fast as it goes."""

    egress: Egress
    download_kbit_per_second: Rate | None = None
    upload_kbit_per_second: Rate | None = None


class ChangeNetworkRequest(RequestBody):
    """What is absent stays as it is. ``egress_mode`` is changed first, then ``deny`` takes entries away, then ``allow``
    adds some. An entry is a network (``10.1.0.0/16``) or a domain (``github.com``). A rate that is ``null`` is lifted."""

    egress_mode: EgressMode | None = None
    deny: Entries
    allow: Entries
    download_kbit_per_second: Rate | None = None
    upload_kbit_per_second: Rate | None = None


class NetworkUsage(BaseModel):
    """Since the sandbox took its network slot, from its view. ``refused_packets``: sent, and kept back by the policy."""

    received_bytes: int
    sent_bytes: int
    received_packets: int
    sent_packets: int
    refused_packets: int


class SandboxNetwork(BaseModel):
    """``in_force``: false while the policy is stored and the network has not taken it yet; that is tried again until it
    has. ``connected``: false where no sandbox of this host has a way out, whatever its policy says; then
    ``not_connected_reason`` says so. ``address`` and ``gateway``: where the sandbox has a network slot. ``usage``: where
    there is a slot and its counters can be read."""

    policy: NetworkPolicy
    in_force: bool
    connected: bool
    not_connected_reason: str | None = None
    address: str | None = None
    gateway: str | None = None
    usage: NetworkUsage | None = None
