"""The home's rules as they stand in the kernel: loaded whole, changed slot by slot, looked after.

Called by ``home`` and ``slots``. The kernel numbers its transactions, so as long as the last one was ours nothing has to
be looked at, however many slots there are. After another's, all of the two tables is compared with what was put there.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address

from atelier.host.nftables import Nftables
from atelier.host.nftables_messages import RulesMessage
from atelier.model.errors import CommandError
from atelier.network_holder.listings import ListedObject, parse_counters, parse_marks, parse_opened, parse_table
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.rules import (
    Carried,
    Slot,
    Surroundings,
    home_rules,
    names_opened,
    slot_added,
    slot_chain,
    slot_changed,
    slot_removed,
)

_logger = logging.getLogger(__name__)

_TRIES = 5
_RATES_REMEMBERED = 256
_CLOCK_SECONDS = 2.0
"""How far the kernel's expiry of an element and our reckoning of it may lie apart."""
_OF_SLOTS = frozenset({"generation", "current", "egress", "refused", "names"})
"""Sets whose elements follow from the slots."""
_OF_PACKETS = frozenset({"asking", "flows"})
"""Sets whose elements come and go with what guests send."""


class KeptRules:
    """``taps``: names of the TAPs that are there; the rules of others would be refused."""

    def __init__(self, names: NetworkNames, rules: Nftables, taps: Callable[[], set[str]]) -> None:
        self._names = names
        self._rules = rules
        self._taps = taps
        self._around: Surroundings | None = None
        self._slots: dict[str, Slot] = {}
        self._opened: dict[IPv4Address, dict[IPv4Address, float]] = {}
        self._frame: dict[str, ListedObject] = {}
        self._sending: dict[str, ListedObject] = {}
        self._generation: int | None = None
        self._listed_once: dict[int | None, tuple[Slot, ListedObject]] = {}

    @property
    def around(self) -> Surroundings:
        assert self._around is not None, "nothing was loaded yet"
        return self._around

    def load(self, around: Surroundings, slots: Iterable[Slot]) -> None:
        """All of it, in one transaction. Addresses that names have opened stay open for the time they have left, packets
        that were refused stay counted, where they are there still. Raises CommandError."""
        self._around = around
        self._reload(list(slots))

    def adopt_opened(self, slots: Iterable[Slot]) -> None:
        """What a holder before this one has opened, of slots whose policy is the one that it was opened for."""
        generations = parse_marks(self._list("map", "generation"))
        fitting = {slot.address for slot in slots if generations.get(slot.address) == slot.generation}
        for (guest, address), seconds in parse_opened(self._list("set", "names")).items():
            if guest in fitting:
                self._opened.setdefault(guest, {})[address] = time.monotonic() + seconds

    def find(self, tap: str) -> Slot | None:
        """The slot, if it has rules."""
        return self._slots.get(tap)

    def put(self, slot: Slot) -> None:
        """Have the rules of this slot. Where it has some, on the same TAP with the same addresses, its policy changes.
        Raises CommandError."""
        before = self._slots.get(slot.tap)
        if before is None:
            messages = slot_added(self._names, slot)
        else:
            closed = self._close_names(slot.address) if _closes_names(before, slot) else ()
            messages = slot_changed(self._names, before, slot, closed)
        self._slots[slot.tap] = slot
        try:
            fresh = before is None or before.chain != slot.chain
            self._change(messages, first=slot_chain(self._names, slot) if fresh else "", tap=slot.tap)
        except BaseException:
            # What stands is not known: it is looked at before it is trusted again.
            self._generation = None
            del self._slots[slot.tap]
            if before is not None:
                self._slots[slot.tap] = before
            raise

    def remove(self, taps: Iterable[str]) -> None:
        """In one transaction. Idempotent. Raises CommandError."""
        gone = [slot for tap in taps if (slot := self._slots.pop(tap, None)) is not None]
        opened = {slot.address: self._close_names(slot.address) for slot in gone}
        self._change([message for slot in gone for message in slot_removed(self._names, slot, opened[slot.address])])
        for slot in gone:
            self._sending.pop(slot.tap, None)

    def opened(self, guest: IPv4Address) -> dict[IPv4Address, float]:
        """Addresses that names have opened to this guest, each with the time (monotonic) until which it is; some may just
        have run out."""
        now = time.monotonic()
        left = {
            address: until for address, until in self._opened.get(guest, {}).items() if until > now - _CLOCK_SECONDS
        }
        self._opened[guest] = left
        return left

    def open_names(self, guest: IPv4Address, seconds: Mapping[IPv4Address, int]) -> None:
        """Raises CommandError."""
        now = time.monotonic()
        self.opened(guest).update({address: now + each for address, each in seconds.items()})
        self._change(names_opened(self._names, guest, seconds))

    def refused(self) -> dict[IPv4Address, tuple[int, int]]:
        """(packets, bytes) that each guest has sent in vain. They begin at 0 where somebody removed the table."""
        return parse_counters(self._list("set", "refused"))

    def is_intact(self) -> bool:
        """Whether everything stands as it was put there."""
        generation = self._rules.generation()
        if generation == self._generation:
            return True
        inet, netdev = self._listed("inet"), self._listed("netdev")
        if inet is None or netdev != self._sending or not self._is_expected(inet):
            return False
        self._generation = generation
        return True

    # --- transactions -------------------------------------------------------------------------------------------------

    def _change(self, messages: list[RulesMessage], *, first: str = "", tap: str = "") -> None:
        """One transaction, or, where it cannot be or somebody else came between, all of the rules. ``first``: commands for
        what nothing refers to before the transaction; ``tap``: whose chain may be another."""
        if not messages:
            return
        try:
            before = expected = self._rules.generation()
            if first:
                self._rules.run(first)
                expected = _next(expected)
            self._rules.apply(messages)
            expected = _next(expected)
            if tap:
                self._sending[tap] = self._sending_of(self._slots[tap])
            after = self._rules.generation()
        except CommandError as error:
            _logger.warning("a change does not fit the rules that stand, which are loaded anew: %s", error)
            self._reload(list(self._slots.values()))
            return
        if after != expected:
            self._reload(list(self._slots.values()))
        elif before == self._generation:
            self._generation = after

    def _sending_of(self, slot: Slot) -> ListedObject:
        """The TAP's chain as nft lists it: listing it takes a millisecond, so once for each rate."""
        rate = slot.upload_bytes_per_second
        if rate not in self._listed_once:
            if len(self._listed_once) >= _RATES_REMEMBERED:
                self._listed_once.clear()
            listing = self._rules.find(f"chain netdev {self._names.table} {slot.tap}") or ""
            self._listed_once[rate] = (slot, parse_table(listing)[slot.tap])
        model, listed = self._listed_once[rate]
        frame = listed.frame
        for theirs, own in (
            (model.tap, slot.tap),
            (model.mac_address, slot.mac_address),
            (str(model.address), str(slot.address)),
        ):
            frame = re.sub(rf"(?<![\w.]){re.escape(theirs)}(?![\w.])", own, frame)
        return replace(listed, frame=frame)

    def _reload(self, slots: list[Slot]) -> None:
        there = self._taps()
        standing = [slot for slot in slots if slot.tap in there]
        self._generation = None
        inet = netdev = None
        for _ in range(_TRIES):
            before = self._rules.generation()
            carried = Carried(self._seconds_left(standing), self.refused())
            self._rules.run(home_rules(self._names, self.around, standing, carried))
            inet, netdev = self._listed("inet"), self._listed("netdev")
            after = self._rules.generation()
            if after == _next(before):
                self._generation = after
                break
        self._slots = {slot.tap: slot for slot in standing}
        own = {slot.chain for slot in standing}
        self._frame = {name: each for name, each in (inet or {}).items() if name not in own}
        self._sending = netdev or {}

    def _seconds_left(self, slots: list[Slot]) -> dict[tuple[IPv4Address, IPv4Address], int]:
        now = time.monotonic()
        return {
            (slot.address, address): round(until - now)
            for slot in slots
            for address, until in self.opened(slot.address).items()
            if until - now >= 1
        }

    def _close_names(self, guest: IPv4Address) -> list[IPv4Address]:
        """Forget them; returns those that may be open in the kernel still."""
        return list(self._opened.pop(guest, {}))

    def _list(self, kind: str, name: str) -> str:
        """With counters and times; empty if there is none."""
        try:
            return self._rules.run(f"list {kind} inet {self._names.table} {name}")
        except CommandError:
            return ""

    def _listed(self, family: str) -> dict[str, ListedObject] | None:
        listing = self._rules.find(f"table {family} {self._names.table}")
        return None if listing is None else parse_table(listing)

    # --- comparing ----------------------------------------------------------------------------------------------------

    def _is_expected(self, found: dict[str, ListedObject]) -> bool:
        slots = self._slots.values()
        own = {slot.chain: slot for slot in slots if slot.chain is not None}
        if found.keys() != self._frame.keys() | own.keys():
            return False
        for name, each in found.items():
            if name in own:
                expected = each.kind == "chain" and each.rules == own[name].chain_rules
            elif name in _OF_SLOTS | _OF_PACKETS:
                expected = each.frame == self._frame[name].frame
            else:
                expected = each == self._frame[name]
            if not expected:
                return False
        return (
            found["generation"].elements == frozenset(f"{slot.address} : {slot.mark}" for slot in slots)
            and found["current"].elements == frozenset(f"{slot.address} . {slot.mark}" for slot in slots)
            and found["egress"].elements
            == frozenset(f"{slot.address} : {slot.verdict}" for slot in slots if slot.verdict)
            and {text.split(" ")[0] for text in found["refused"].elements} == {str(slot.address) for slot in slots}
            and self._are_expected_names({text.partition(" timeout")[0] for text in found["names"].elements})
        )

    def _are_expected_names(self, found: set[str]) -> bool:
        """Those that are about to run out, or have just done so, may be there or not."""
        now = time.monotonic()
        times = {
            f"{slot.address} . {address}": until
            for slot in self._slots.values()
            for address, until in self._opened.get(slot.address, {}).items()
        }
        must = {name for name, until in times.items() if until > now + _CLOCK_SECONDS}
        may = {name for name, until in times.items() if until > now - _CLOCK_SECONDS}
        return must <= found <= may


def _closes_names(before: Slot, after: Slot) -> bool:
    """Whether the new policy takes back a domain: it is not known which one has opened which address."""
    return not set(before.policy.egress.domains) <= set(after.policy.egress.domains)


def _next(generation: int) -> int:
    return generation + 1 if generation < (1 << 32) - 1 else 1
