"""The network of an installation in a namespace of its own: a bridge, rules, and a slot for each sandbox.

Called by ``control``. Everything that has to outlive this process lies in the kernel (slots, whose TAPs say whose they
are; the addresses, which are the bridge's) and in the run directory (policies). So a holder that starts anew finds all of
it again. The process' main thread is in the home's namespace as long as a home is open.
"""

from __future__ import annotations

import contextlib
import logging
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

from atelier.host import namespaces
from atelier.host.netlink import Link
from atelier.model.address_plan import AddressPlan, is_plan_subnet, overlapping
from atelier.model.errors import AtelierError, HostError
from atelier.network_holder.kept_rules import KeptRules
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.places import Place
from atelier.network_holder.plans import settle_plan
from atelier.network_holder.policies import PolicyFiles
from atelier.network_holder.rules import Surroundings
from atelier.network_holder.side import NetworkSide
from atelier.network_holder.slots import NetworkSlots
from atelier.network_holder.uplink import Uplink

_logger = logging.getLogger(__name__)

_GATEWAY_MAC_PREFIX = "02:a7:e1"


class NetworkHome:
    """``policies``: the folder in which the slots' policies are kept."""

    def __init__(self, names: NetworkNames, place: Place, uplink: Uplink, plan_file: Path, policies: Path) -> None:
        self._names = names
        self._place = place
        self._uplink = uplink
        self._plan_file = plan_file
        self._files = PolicyFiles(policies)
        self._side: NetworkSide | None = None
        self._slots: NetworkSlots | None = None
        self._rules: KeptRules | None = None
        self._plan: AddressPlan | None = None
        self._bridge = 0

    @property
    def side(self) -> NetworkSide:
        assert self._side is not None, "the home is not open"
        return self._side

    @property
    def slots(self) -> NetworkSlots:
        assert self._slots is not None, "the home is not open"
        return self._slots

    @property
    def rules(self) -> KeptRules:
        assert self._rules is not None, "the home is not open"
        return self._rules

    @property
    def plan(self) -> AddressPlan:
        assert self._plan is not None, "the home is not open"
        return self._plan

    async def open(self) -> None:
        """Have the home, or find the one that is there. Refuses before anything is changed.

        Raises HostError, MissingProgramError; what was made by then is gone again, unless slots stand on it.
        """
        self._uplink.require_possible()
        try:
            await self._make()
        except BaseException:
            if self._slots is None or not self._slots.leases():
                with contextlib.suppress(AtelierError):
                    await self.remove()
            raise

    async def _make(self) -> None:
        taken = self._uplink.taken_networks()
        namespace = await self._place.ensure()
        namespaces.enter(namespace)
        self._side = NetworkSide.open(namespace)
        self._require_own_bridge()
        self._rules = KeptRules(self._names, self._side.rules, self._taps)
        self._slots = NetworkSlots(self._names, self._side.links, self._rules, self._side.flows, self._files)
        self._slots.adopt()
        self._plan = settle_plan(self._plan_file, self._names.installation_id, taken, self._subnet_in_use())
        self._remove_other_plan()
        if not self._place.shared:
            for name in ("all", "default"):
                namespaces.write_setting(f"ipv6/conf/{name}/disable_ipv6", "1", missing_ok=True)
            # What stays on the bridge is the bridge's: the host's own filters for bridged packets have no say here.
            namespaces.write_setting("bridge/bridge-nf-call-iptables", "0", missing_ok=True)
        self._slots.open(self._plan)
        self._rules.load(self._surroundings(), self._slots.described())
        self._ensure_bridge()
        await self._uplink.ensure(self.plan, self.side)
        self._forward()

    def close(self) -> None:
        """Let go of it; it stays as it is."""
        if self._side is not None:
            self._side.close()
            self._side = None

    async def remove(self) -> None:
        """Leave nothing behind. Machines that hold a TAP still are cut off."""
        if self._side is not None:
            if self._slots is not None:
                self._slots.remove_all()
            if self._is_ours(self._side.links.find_link(self._names.bridge)):
                self._side.links.delete_link(self._names.bridge)
        await self._uplink.remove()
        await self._place.remove()

    # --- staying as it is ---------------------------------------------------------------------------------------------

    async def check(self) -> bool:
        """Put back what somebody removed or changed, and follow the host's networks; whether anything was put back."""
        changed = await self._uplink.check(self.plan)
        around = self._surroundings()
        foreign = not self.rules.is_intact()
        if foreign or around != self.rules.around:
            self.rules.load(around, self.slots.described())
        self._forward()
        opened = self._close_opened_ports()
        self.slots.forget_flows()
        if foreign or changed or opened:
            _logger.warning("somebody removed or changed rules of the sandboxes' network: put back")
        return foreign or changed or opened

    def _close_opened_ports(self) -> bool:
        """Whether there were ports that somebody had opened to one another, or whose entry was removed."""
        closed = self.side.links.closed_ports()
        entries = set(self.side.links.forwarding_entries())
        links = self.side.links.links()
        found = False
        for lease in self.slots.leases():
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
        return found

    def _taps(self) -> set[str]:
        return {name for name in self.side.links.links() if self._names.is_tap(name)}

    def _surroundings(self) -> Surroundings:
        own, connected = self._uplink.own_networks(), self._uplink.connected_networks()
        return Surroundings(self.plan, self._uplink.link, frozenset(own), frozenset(connected))

    def _subnet_in_use(self) -> IPv4Network | None:
        bridge = self.side.links.find_link(self._names.bridge)
        if bridge is None or not self.slots.leases():
            return None
        subnets = [address.network for index, address in self.side.links.addresses() if index == bridge.index]
        return next((subnet for subnet in subnets if is_plan_subnet(subnet)), None)

    def _remove_other_plan(self) -> None:
        """Links that stand on other addresses than the plan's, where no slot needs them."""
        gateway = IPv4Interface((self.plan.gateway, self.plan.subnet.prefixlen))
        if self.slots.leases() or gateway in [address for _, address in self.side.links.addresses()]:
            return
        self.side.links.delete_link(self._names.bridge)
        self.side.links.delete_link(self._names.uplink_home)

    def _is_ours(self, bridge: Link | None) -> bool:
        return bridge is not None and (not self._place.shared or bridge.alias == self._names.bridge_alias)

    def _require_own_bridge(self) -> None:
        name = self._names.bridge
        bridge = self.side.links.find_link(name)
        if bridge is not None and not self._is_ours(bridge):
            raise HostError(
                f"the host has a link {name} already, which is not this installation's",
                code="bridge_not_ours",
                hint=f"choose another name (ATELIER_BRIDGE_NAME), or remove that one: ip link delete {name}",
            )

    def _forward(self) -> None:
        """Have the home forward packets. The host's own setting is the administrator's."""
        if not self._place.shared:
            namespaces.write_setting("ipv4/ip_forward", "1")

    def _ensure_bridge(self) -> None:
        links, name = self.side.links, self._names.bridge
        if links.find_link(name) is None:
            links.create_bridge(name, _gateway_mac(self.plan))
        self._bridge = links.get_link(name).index
        links.set_alias(self._bridge, self._names.bridge_alias)
        namespaces.write_setting(f"ipv6/conf/{name}/disable_ipv6", "1", missing_ok=True)
        links.ensure_address(self._bridge, IPv4Interface((self.plan.gateway, self.plan.subnet.prefixlen)))
        links.set_up(self._bridge)


def _gateway_mac(plan: AddressPlan) -> str:
    """The same for as long as the addresses are: guests remember it."""
    return f"{_GATEWAY_MAC_PREFIX}:{plan.gateway.packed[:3].hex(':')}"
