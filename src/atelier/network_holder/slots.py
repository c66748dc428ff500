"""The slots of a home: who holds which, what each may reach, how much it has sent and received.

Called by ``home``. A slot is a TAP whose alias says whose it is (``atelier <sandbox id> <lease> <MAC address>``), with
its rules and a file that keeps its policy. So a holder that starts anew finds all of them again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from atelier.host import tap
from atelier.host.flow_table import FlowTable
from atelier.host.namespaces import write_setting
from atelier.host.netlink import RouteSocket
from atelier.model.address_plan import AddressPlan
from atelier.model.errors import ConflictError, HostError, NotFoundError
from atelier.model.machine import GuestAddress
from atelier.model.network_policy import EgressMode, EgressPolicy, NetworkPolicy, NetworkUsage
from atelier.network_holder.kept_rules import KeptRules
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.policies import KeptPolicy, PolicyFiles, new_generation
from atelier.network_holder.rates import set_download
from atelier.network_holder.rules import Slot

_MAX_OPENED = 1024
"""Addresses that names may have opened to one guest at a time."""
_SLACK_SECONDS = 1.0
_FORGOTTEN_ADDRESSES, _FORGOTTEN_FLOWS = 8, 2048
"""At a time, the second of each: other requests wait meanwhile."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds a slot."""

    sandbox_id: str
    number: int
    mac_address: str

    @property
    def alias(self) -> str:
        return f"atelier {self.sandbox_id} {self.number} {self.mac_address}"

    @staticmethod
    def parse(alias: str) -> Lease | None:
        words = alias.split(" ")
        if len(words) != 4 or words[0] != "atelier" or not words[2].isdigit():
            return None
        return Lease(words[1], int(words[2]), words[3])


class NetworkSlots:
    """``links`` and ``rules`` are the home's, in whose namespace the process is."""

    def __init__(
        self, names: NetworkNames, links: RouteSocket, rules: KeptRules, flows: FlowTable, files: PolicyFiles
    ) -> None:
        self._names = names
        self._links = links
        self._rules = rules
        self._flows = flows
        self._left: set[IPv4Address] = set()
        self._files = files
        self._plan: AddressPlan | None = None
        self._leases: dict[str, Lease] = {}
        self._policies: dict[str, KeptPolicy] = {}
        self._owners: dict[IPv4Address, str] = {}
        self._by_tap: dict[str, str] = {}

    # --- those that are there -----------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Find the slots that are there. A TAP without an owner was never up: its making was broken off."""
        for link in self._links.links().values():
            if not self._names.is_tap(link.name):
                continue
            lease = Lease.parse(link.alias)
            if lease is None:
                self._links.delete_link(link.name)
            else:
                self._leases[lease.sandbox_id] = lease
                self._by_tap[link.name] = lease.sandbox_id
                if link.group != self._names.tap_group:
                    # Its freeing was broken off, and is asked for again.
                    self._links.set_group(link.index, self._names.tap_group)

    def open(self, plan: AddressPlan) -> None:
        """Give them their addresses, and the policies that were kept for them. Raises HostError."""
        self._plan = plan
        self._files.open(self._leases)
        for sandbox_id, lease in self._leases.items():
            self._policies[sandbox_id] = self._files.read(sandbox_id)
            self._owners[plan.address_of(lease.number)] = sandbox_id
        self._rules.adopt_opened(self.described())

    def leases(self) -> list[Lease]:
        return list(self._leases.values())

    def described(self) -> list[Slot]:
        return [self._describe(lease, self._policies[lease.sandbox_id]) for lease in self._leases.values()]

    def ids(self) -> list[str]:
        return sorted(self._leases)

    def remove_all(self) -> None:
        """Machines that hold a TAP still are cut off. Their rules go with the home's."""
        for group in (self._names.tap_group, self._names.freed_group):
            self._links.delete_group(group)
        self._files.remove_all()

    # --- one of them --------------------------------------------------------------------------------------------------

    async def ensure(self, lease: Lease, policy: NetworkPolicy) -> GuestAddress:
        """Raises ConflictError (``lease_taken``, ``slot_name_taken``), HostError."""
        address = self._open_plan.guest_address(lease.number)
        self._refuse_another(lease)
        name, bridge = self._names.tap(lease.sandbox_id), self._links.get_link(self._names.bridge).index
        link = self._links.find_link(name)
        if (
            link is not None
            and link.up
            and link.master == bridge
            and link.alias == lease.alias
            and link.group == self._names.tap_group
            and self._rules.find(name) is not None
        ):
            await self.set_policy(lease.sandbox_id, policy)
            return address
        # From nothing or from a half: the link goes up last, when all that keeps it in its place stands.
        if link is None:
            tap.create_persistent(name)
            link = self._links.get_link(name)
            # Or the home's kernel would speak IPv6 to the guest, whom nothing keeps from hearing it.
            write_setting(f"ipv6/conf/{name}/disable_ipv6", "1", missing_ok=True)
        elif link.up:
            self._links.set_up(link.index, up=False)
        self._links.set_group(link.index, self._names.tap_group)
        self._links.set_alias(link.index, lease.alias)
        # Those of a link that is gone would not hold for its successor.
        self._rules.remove([name])
        self._take(lease, KeptPolicy(policy, new_generation()))
        self._links.set_master(link.index, bridge)
        self._links.close_port(link.index)
        self._links.set_forwarding_entry(link.index, lease.mac_address)
        await set_download(link, policy.download_kbit_per_second)
        self._enforce(lease.sandbox_id)
        self._links.set_up(link.index)
        return address

    def ensure_absent(self, sandbox_id: str) -> None:
        if sandbox_id in self._leases:
            self._links.delete_link(self._names.tap(sandbox_id))
            self._forget([sandbox_id])

    def ensure_all_absent(self, sandbox_ids: Sequence[str]) -> None:
        """In little more time than one takes. When it raises, any of them may be there still."""
        there = [sandbox_id for sandbox_id in sandbox_ids if sandbox_id in self._leases]
        if not there:
            return
        names = [self._names.tap(sandbox_id) for sandbox_id in there]
        try:
            for name in names:
                self._links.set_group_of(name, self._names.freed_group)
            self._links.delete_group(self._names.freed_group)
        except HostError:
            # None may stay where the next ones to be freed would take it along, or fail for it.
            for name in names:
                with contextlib.suppress(HostError):
                    self._links.set_group_of(name, self._names.tap_group)
            raise
        self._forget(there)

    def _forget(self, sandbox_ids: Sequence[str]) -> None:
        """Their rules once their links are gone: until then no packet may find them missing."""
        self._rules.remove([self._names.tap(sandbox_id) for sandbox_id in sandbox_ids])
        for sandbox_id in sandbox_ids:
            self._files.remove(sandbox_id)
            lease = self._leases.pop(sandbox_id)
            address = self._open_plan.address_of(lease.number)
            self._owners.pop(address, None)
            self._left.add(address)
            self._by_tap.pop(self._names.tap(sandbox_id), None)
            self._policies.pop(sandbox_id, None)

    def forget_flows(self) -> None:
        """Some of those that guests have left behind. They would count as their successors', and fill a table that all
        share; it takes milliseconds for each guest, so it is done when nobody waits."""
        for address in list(self._left)[:_FORGOTTEN_ADDRESSES]:
            successor = self._owners.get(address)
            mark = None if successor is None else self._policies[successor].generation
            if self._flows.forget(address, but_marked=mark, at_most=_FORGOTTEN_FLOWS) < _FORGOTTEN_FLOWS:
                self._left.discard(address)

    def tap_name(self, sandbox_id: str) -> str:
        return self._names.tap(sandbox_id)

    def open_tap(self, sandbox_id: str) -> int:
        """Raises NotFoundError (``no_network_slot``), ConflictError (``slot_in_use``)."""
        self._get(sandbox_id)
        return tap.open_existing(self._names.tap(sandbox_id))

    async def set_policy(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        """In force when it returns, for open flows too. Raises NotFoundError (``no_network_slot``), HostError."""
        lease, kept = self._get(sandbox_id), self._policies[sandbox_id]
        name = self._names.tap(sandbox_id)
        link = self._links.find_link(name)
        if link is not None:
            await set_download(link, policy.download_kbit_per_second)
        if policy == kept.policy and self._rules.find(name) == self._describe(lease, kept):
            return
        same = policy.egress == kept.policy.egress
        self._policies[sandbox_id] = KeptPolicy(policy, kept.generation if same else new_generation())
        self._enforce(sandbox_id)

    def read_usage(self) -> dict[str, NetworkUsage]:
        """By sandbox id. Refused packets begin at 0 again where somebody removed the table that counts them."""
        traffic, refused = self._links.traffic(), self._rules.refused()
        found: dict[str, NetworkUsage] = {}
        for sandbox_id, lease in self._leases.items():
            counted = traffic.get(self._names.tap(sandbox_id))
            if counted is not None:
                found[sandbox_id] = NetworkUsage(
                    received_bytes=counted.sent_bytes,
                    sent_bytes=counted.received_bytes,
                    received_packets=counted.sent_packets,
                    sent_packets=counted.received_packets,
                    refused_packets=refused.get(self._open_plan.address_of(lease.number), (0, 0))[0],
                )
        return found

    # --- for the resolver (NameGate) ----------------------------------------------------------------------------------

    def policy_of(self, guest: IPv4Address) -> EgressPolicy | None:
        """None: no slot has this address."""
        sandbox_id = self._owners.get(guest)
        return None if sandbox_id is None else self._policies[sandbox_id].policy.egress

    def open_addresses(self, guest: IPv4Address, addresses: Sequence[IPv4Address], seconds: int) -> list[IPv4Address]:
        """Open those of ``addresses`` that a name may open, for at least so long; returns those that the guest may reach
        now. Done when it returns. Raises CommandError."""
        policy, around = self.policy_of(guest), self._rules.around
        if policy is None or policy.mode is EgressMode.NONE:
            return []
        reached = [address for address in addresses if not around.is_never(address)]
        listed = {address for address in reached if any(address in network for network in policy.networks)}
        public = [address for address in reached if address not in listed and not around.is_private(address)]
        if policy.mode is EgressMode.LIST:
            public = self._open(guest, public, seconds)
        return [address for address in reached if address in listed or address in public]

    def _open(self, guest: IPv4Address, addresses: Sequence[IPv4Address], seconds: int) -> list[IPv4Address]:
        """Those that are open now: all of them, but for what one guest may have at a time."""
        opened = self._rules.opened(guest)
        room = max(0, _MAX_OPENED - len(opened))
        fresh = [address for address in dict.fromkeys(addresses) if address not in opened][:room]
        until = time.monotonic() + seconds - _SLACK_SECONDS
        renewed = [address for address in dict.fromkeys(addresses) if opened.get(address, until) < until]
        if fresh or renewed:
            self._rules.open_names(guest, dict.fromkeys([*fresh, *renewed], seconds))
        return [address for address in addresses if address in opened or address in fresh]

    # --- what they are made of ----------------------------------------------------------------------------------------

    @property
    def _open_plan(self) -> AddressPlan:
        assert self._plan is not None, "the slots are not open"
        return self._plan

    def _get(self, sandbox_id: str) -> Lease:
        lease = self._leases.get(sandbox_id)
        if lease is None:
            raise NotFoundError(f"sandbox {sandbox_id} has no network slot", code="no_network_slot")
        return lease

    def _refuse_another(self, lease: Lease) -> None:
        name = self._names.tap(lease.sandbox_id)
        owner = self._owners.get(self._open_plan.address_of(lease.number), lease.sandbox_id)
        if owner != lease.sandbox_id:
            raise ConflictError(f"the network slot {lease.number} is held by sandbox {owner}", code="lease_taken")
        owner = self._by_tap.get(name, lease.sandbox_id)
        if owner != lease.sandbox_id:
            raise ConflictError(
                f"sandbox {owner} has a TAP of the name {name} already",
                code="slot_name_taken",
                hint="create the sandbox anew: it gets another id",
            )

    def _take(self, lease: Lease, kept: KeptPolicy) -> None:
        before = self._leases.get(lease.sandbox_id)
        if before is not None:
            self._owners.pop(self._open_plan.address_of(before.number), None)
        self._leases[lease.sandbox_id] = lease
        self._policies[lease.sandbox_id] = kept
        self._owners[self._open_plan.address_of(lease.number)] = lease.sandbox_id
        self._by_tap[self._names.tap(lease.sandbox_id)] = lease.sandbox_id

    def _enforce(self, sandbox_id: str) -> None:
        """Keep the policy, then have its rules: a holder that ends in between is followed by one that goes on."""
        kept = self._policies[sandbox_id]
        self._files.write(sandbox_id, kept.policy, kept.generation)
        self._rules.put(self._describe(self._leases[sandbox_id], kept))

    def _describe(self, lease: Lease, kept: KeptPolicy) -> Slot:
        return Slot(
            self._names.tap(lease.sandbox_id),
            lease.mac_address,
            self._open_plan.address_of(lease.number),
            kept.policy,
            kept.generation,
        )
