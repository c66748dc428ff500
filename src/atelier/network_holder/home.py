"""The network of an installation in a namespace of its own: a bridge, rules, and a slot for each sandbox.

Called by ``control``. Everything that has to outlive this process lies in the kernel: a slot is a TAP whose alias says
whose it is (``atelier <sandbox id> <lease> <MAC address>``), and the addresses are the bridge's. So a holder that
starts anew finds all of it again. The process' main thread is in the home's namespace as long as a home is open.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from atelier.host import namespaces, tap
from atelier.host.netlink import Link
from atelier.model.address_plan import AddressPlan, is_plan_subnet, overlapping
from atelier.model.errors import AtelierError, ConflictError, HostError, NotFoundError
from atelier.model.machine import GuestAddress
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.plans import settle_plan
from atelier.network_holder.rules import Slot, home_rules, slot_rules, slot_rules_absent
from atelier.network_holder.side import NetworkSide
from atelier.network_holder.uplink import VethUplink

_logger = logging.getLogger(__name__)

_GATEWAY_MAC_PREFIX = "02:a7:e1"
_TAP_GROUP, _FREED_GROUP = 1, 2
"""In a namespace of our own, where no other groups are. What is to be deleted moves from the first to the second."""
_CHAIN = re.compile(r"^\tchain (\S+) \{\n.*?^\t\}", re.MULTILINE | re.DOTALL)


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


class NetworkHome:
    """``nameserver``: where guests' questions to the gateway's port 53 go, None: nowhere."""

    def __init__(
        self, names: NetworkNames, uplink: VethUplink, plan_file: Path, nameserver: IPv4Address | None
    ) -> None:
        self._names = names
        self._uplink = uplink
        self._plan_file = plan_file
        self._nameserver = nameserver
        self._leases: dict[str, Lease] = {}
        self._side: NetworkSide | None = None
        self._plan: AddressPlan | None = None
        self._bridge = 0
        self._blocked: list[IPv4Network] = []
        self._listing: str | None = None
        self._chains: dict[str, str] = {}

    @property
    def side(self) -> NetworkSide:
        assert self._side is not None, "the home is not open"
        return self._side

    @property
    def plan(self) -> AddressPlan:
        assert self._plan is not None, "the home is not open"
        return self._plan

    async def open(self) -> None:
        """Have the home, or find the one that is there. Refuses before anything is changed.

        Raises HostError, MissingProgramError; what was made by then is gone again, unless slots stand on it.
        """
        self._uplink.require_forwarding()
        try:
            await self._make()
        except BaseException:
            if not self._leases:
                with contextlib.suppress(AtelierError):
                    await self.remove()
            raise

    async def _make(self) -> None:
        taken = self._uplink.taken_networks()
        namespace = await namespaces.ensure_named(self._names.namespace)
        namespaces.enter(namespace)
        self._side = NetworkSide.open(namespace)
        self._adopt()
        self._plan = settle_plan(self._plan_file, self._names.installation_id, taken, self._subnet_in_use())
        self._remove_other_plan()
        for name, value in (("all", "1"), ("default", "1")):
            namespaces.write_setting(f"ipv6/conf/{name}/disable_ipv6", value, missing_ok=True)
        # What stays on the bridge is the bridge's: the host's own filters for bridged packets have no say here.
        namespaces.write_setting("bridge/bridge-nf-call-iptables", "0", missing_ok=True)
        self._blocked = self._uplink.connected_networks()
        self._load()
        self._ensure_bridge()
        await self._uplink.ensure(self.plan, self.side)
        namespaces.write_setting("ipv4/ip_forward", "1")

    def close(self) -> None:
        """Let go of it; it stays as it is."""
        if self._side is not None:
            self._side.close()
            self._side = None

    async def remove(self) -> None:
        """Leave nothing behind. Machines that hold a TAP still are cut off."""
        if self._side is not None:
            for group in (_TAP_GROUP, _FREED_GROUP):
                self._side.links.delete_group(group)
            self._side.links.delete_link(self._names.bridge)
        await self._uplink.remove()
        await namespaces.ensure_named_absent(self._names.namespace)

    # --- slots --------------------------------------------------------------------------------------------------------

    def ensure_slot(self, lease: Lease) -> GuestAddress:
        """Raises ConflictError (``lease_taken``, ``slot_name_taken``), HostError."""
        address = self.plan.guest_address(lease.number)
        name = self._names.tap(lease.sandbox_id)
        for other in self._leases.values():
            if other.sandbox_id == lease.sandbox_id:
                continue
            if other.number == lease.number:
                raise ConflictError(
                    f"the network slot {lease.number} is held by sandbox {other.sandbox_id}", code="lease_taken"
                )
            if self._names.tap(other.sandbox_id) == name:
                raise ConflictError(
                    f"sandbox {other.sandbox_id} has a TAP of the name {name} already",
                    code="slot_name_taken",
                    hint="create the sandbox anew: it gets another id",
                )
        links = self.side.links
        link = links.find_link(name)
        if (
            link is not None
            and link.up
            and link.master == self._bridge
            and link.alias == lease.alias
            and link.group == _TAP_GROUP
            and name in self._chains
        ):
            return address
        # From nothing or from a half: the link goes up last, when all that keeps it in its place stands.
        if link is None:
            tap.create_persistent(name)
            link = links.get_link(name)
        elif link.up:
            links.set_up(link.index, up=False)
        links.set_group(link.index, _TAP_GROUP)
        links.set_alias(link.index, lease.alias)
        self._leases[lease.sandbox_id] = lease
        links.set_master(link.index, self._bridge)
        links.close_port(link.index)
        links.set_forwarding_entry(link.index, lease.mac_address)
        self.side.rules.run(slot_rules(self._names, self._slot(lease)))
        self._remember_chain(name)
        links.set_up(link.index)
        return address

    def ensure_slot_absent(self, sandbox_id: str) -> None:
        if sandbox_id in self._leases:
            self.side.links.delete_link(self._names.tap(sandbox_id))
            self._forget([sandbox_id])

    def ensure_slots_absent(self, sandbox_ids: Sequence[str]) -> None:
        """All of them in little more time than one. When it raises, any of them may be there still."""
        freed = [each for each in sandbox_ids if each in self._leases]
        taps = [self._names.tap(each) for each in freed]
        links = self.side.links
        if not freed:
            return
        try:
            for tap_name in taps:
                links.set_group_of(tap_name, _FREED_GROUP)
            links.delete_group(_FREED_GROUP)
        except HostError:
            # None may stay where the next ones to be freed would take it along, or fail for it.
            for tap_name in taps:
                with contextlib.suppress(HostError):
                    links.set_group_of(tap_name, _TAP_GROUP)
            raise
        self._forget(freed)

    def _forget(self, sandbox_ids: Sequence[str]) -> None:
        """Their rules, once their links are gone: until then no packet may find them missing."""
        taps = [self._names.tap(each) for each in sandbox_ids]
        self.side.rules.run(slot_rules_absent(self._names, *taps))
        for sandbox_id, tap_name in zip(sandbox_ids, taps, strict=True):
            self._chains.pop(tap_name, None)
            del self._leases[sandbox_id]

    def open_slot(self, sandbox_id: str) -> int:
        """Raises NotFoundError (``no_network_slot``), ConflictError (``slot_in_use``)."""
        if sandbox_id not in self._leases:
            raise NotFoundError(f"sandbox {sandbox_id} has no network slot", code="no_network_slot")
        return tap.open_existing(self._names.tap(sandbox_id))

    def list_slots(self) -> list[str]:
        return sorted(self._leases)

    # --- staying as it is ---------------------------------------------------------------------------------------------

    async def check(self) -> bool:
        """Put back what somebody removed or changed, and follow the host's networks; whether anything was put back."""
        changed = await self._uplink.check(self.plan)
        blocked = self._uplink.connected_networks()
        found = self.side.rules.find(f"table inet {self._names.table}")
        chains = self.side.rules.find(f"table netdev {self._names.table}")
        foreign = found != self._listing or _split(chains or "") != self._chains or chains is None
        if foreign or blocked != self._blocked:
            self._blocked = blocked
            self._load()
        namespaces.write_setting("ipv4/ip_forward", "1")
        opened = self._close_opened_ports()
        if foreign or changed or opened:
            _logger.warning("somebody removed or changed rules of the sandboxes' network: put back")
        return foreign or changed or opened

    def _close_opened_ports(self) -> bool:
        """Whether there were ports that somebody had opened to one another, or whose entry was removed."""
        closed = self.side.links.closed_ports()
        entries = set(self.side.links.forwarding_entries())
        links = self.side.links.links()
        found = False
        for lease in self._leases.values():
            link = links.get(self._names.tap(lease.sandbox_id))
            if link is None or link.master != self._bridge:
                continue
            if link.index not in closed or (link.index, lease.mac_address) not in entries:
                self.side.links.close_port(link.index)
                self.side.links.set_forwarding_entry(link.index, lease.mac_address)
                found = True
        return found

    def problems(self) -> list[str]:
        """What a person has to mend, in words."""
        found = self._uplink.problems()
        for network in overlapping(self.plan, self._uplink.taken_networks()):
            found.append(
                f"the sandboxes' addresses {self.plan.subnet} overlap with this machine's {network}: "
                "stop all sandboxes (atelier down) and start the manager again to have others chosen"
            )
        if self._nameserver is None:
            found.append("no nameserver of this machine's can be used by sandboxes: they resolve no names")
        return found

    def _adopt(self) -> None:
        """Find the slots that are there. A TAP without an owner was never up: its making was broken off."""
        self._leases = {}
        for link in self._taps():
            lease = Lease.parse(link.alias)
            if lease is None:
                self.side.links.delete_link(link.name)
            else:
                self._leases[lease.sandbox_id] = lease
                if link.group != _TAP_GROUP:
                    # Its freeing was broken off, and is asked for again.
                    self.side.links.set_group(link.index, _TAP_GROUP)

    def _taps(self) -> Iterator[Link]:
        return (link for link in self.side.links.links().values() if self._names.is_tap(link.name))

    def _subnet_in_use(self) -> IPv4Network | None:
        bridge = self.side.links.find_link(self._names.bridge)
        if bridge is None or not self._leases:
            return None
        subnets = [address.network for index, address in self.side.links.addresses() if index == bridge.index]
        return next((subnet for subnet in subnets if is_plan_subnet(subnet)), None)

    def _remove_other_plan(self) -> None:
        """Links that stand on other addresses than the plan's, where no slot needs them."""
        gateway = IPv4Interface((self.plan.gateway, self.plan.subnet.prefixlen))
        if self._leases or gateway in [address for _, address in self.side.links.addresses()]:
            return
        self.side.links.delete_link(self._names.bridge)
        self.side.links.delete_link(self._names.uplink_home)

    def _ensure_bridge(self) -> None:
        links = self.side.links
        if links.find_link(self._names.bridge) is None:
            links.create_bridge(self._names.bridge, _gateway_mac(self.plan))
        self._bridge = links.get_link(self._names.bridge).index
        links.ensure_address(self._bridge, IPv4Interface((self.plan.gateway, self.plan.subnet.prefixlen)))
        links.set_up(self._bridge)

    def _load(self) -> None:
        """All rules of the home, in one transaction."""
        # A chain cannot stand without its link, which a stranger may have deleted.
        there = {link.name for link in self._taps()}
        slots = [slot for lease in self._leases.values() if (slot := self._slot(lease)).tap in there]
        self.side.rules.run(
            home_rules(self._names, self.plan, self._uplink.link, self._blocked, self._nameserver, slots)
        )
        self._listing = self.side.rules.find(f"table inet {self._names.table}")
        self._chains = _split(self.side.rules.run(f"list table netdev {self._names.table}"))

    def _remember_chain(self, name: str) -> None:
        self._chains.update(_split(self.side.rules.run(f"list chain netdev {self._names.table} {name}")))

    def _slot(self, lease: Lease) -> Slot:
        return Slot(self._names.tap(lease.sandbox_id), lease.mac_address, self.plan.address_of(lease.number))


def _split(listing: str) -> dict[str, str]:
    """Chains of a listed table, by name."""
    return {match[1]: match[0] for match in _CHAIN.finditer(listing)}


def _gateway_mac(plan: AddressPlan) -> str:
    """The same for as long as the addresses are: guests remember it."""
    return f"{_GATEWAY_MAC_PREFIX}:{plan.gateway.packed[:3].hex(':')}"
