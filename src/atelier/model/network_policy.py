"""What a sandbox may reach, and how fast. Words only: the network holder turns them into rules.

Shapes in JSON (the same in the database, between driver and network holder, and in the API)::

    {"egress": {"mode": "list", "networks": ["203.0.113.0/24"], "domains": ["example.com", "*.example.org"]},
     "download_kbit_per_second": 10000, "upload_kbit_per_second": null}
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import Any, cast

from atelier.model.errors import InvalidRequestError

MAX_ENTRIES = 1000
"""Networks and domains of one sandbox together."""
MIN_RATE_KBIT = 64
MAX_RATE_KBIT = 100_000_000
"""100 Gbit/s: beyond what a TAP carries."""

_DOMAIN_MAX_LENGTH = 253
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NEVER_ALLOWED = tuple(
    IPv4Network(text) for text in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")
)
"""This network, loopback, link-local (the metadata services of clouds among them), multicast, reserved."""


class EgressMode(StrEnum):
    """``all``: the internet, private networks only where they are listed. ``list``: what is listed, nothing else."""

    ALL = "all"
    NONE = "none"
    LIST = "list"


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """``networks`` are collapsed and sorted, ``domains`` lower-case and sorted; ``*.example.org`` stands for every name
    below example.org, at any depth, and not for itself."""

    mode: EgressMode = EgressMode.ALL
    networks: tuple[IPv4Network, ...] = ()
    domains: tuple[str, ...] = ()

    @staticmethod
    def make(mode: EgressMode, networks: Iterable[str] = (), domains: Iterable[str] = ()) -> EgressPolicy:
        """Raises InvalidRequestError, naming the entry that is wrong."""
        given_networks = [parse_network(text) for text in networks]
        given_domains = sorted({parse_domain(text) for text in domains})
        if len(given_networks) + len(given_domains) > MAX_ENTRIES:
            raise InvalidRequestError(
                f"{len(given_networks) + len(given_domains)} networks and domains: a sandbox may have {MAX_ENTRIES}",
                code="invalid_egress_policy",
                hint="allow larger networks, or a whole domain with '*.'",
            )
        if mode is EgressMode.NONE and (given_networks or given_domains):
            raise InvalidRequestError(
                "the egress mode none allows nothing: it takes no networks and no domains",
                code="invalid_egress_policy",
                hint="use the mode list",
            )
        if mode is EgressMode.ALL and given_domains:
            raise InvalidRequestError(
                "the egress mode all takes no domains: the whole internet is allowed",
                code="invalid_egress_policy",
                hint="use the mode list to allow these and nothing else",
            )
        return EgressPolicy(mode, tuple(sorted(collapse_addresses(given_networks))), tuple(given_domains))

    def allows_name(self, name: str) -> bool:
        """Whether a question for this name is answered. ``name``: without the last dot, in any case."""
        if self.mode is not EgressMode.LIST:
            return self.mode is EgressMode.ALL
        name = name.lower()
        if name in self.domains:
            return True
        parents = name.split(".")[1:]
        return any(f"*.{'.'.join(parents[index:])}" in self.domains for index in range(len(parents)))


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """Rates in 1,000 bits a second, from the sandbox's view; None: as fast as it goes."""

    egress: EgressPolicy = field(default_factory=EgressPolicy)
    download_kbit_per_second: int | None = None
    upload_kbit_per_second: int | None = None

    def __post_init__(self) -> None:
        for rate in (self.download_kbit_per_second, self.upload_kbit_per_second):
            if rate is not None and not MIN_RATE_KBIT <= rate <= MAX_RATE_KBIT:
                raise InvalidRequestError(
                    f"a network rate of {rate} kbit/s: it must lie between {MIN_RATE_KBIT} and {MAX_RATE_KBIT}",
                    code="invalid_network_rate",
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "egress": {
                "mode": self.egress.mode.value,
                "networks": [str(network) for network in self.egress.networks],
                "domains": list(self.egress.domains),
            },
            "download_kbit_per_second": self.download_kbit_per_second,
            "upload_kbit_per_second": self.upload_kbit_per_second,
        }

    @staticmethod
    def from_json(value: object) -> NetworkPolicy:
        """Raises InvalidRequestError for whatever ``to_json`` would not have written."""
        whole = _object(value, "the network policy")
        egress = _object(whole.get("egress"), "egress")
        mode = egress.get("mode")
        if mode not in tuple(EgressMode):
            raise _malformed(f"egress.mode is one of {', '.join(EgressMode)}")
        return NetworkPolicy(
            EgressPolicy.make(EgressMode(mode), _texts(egress, "networks"), _texts(egress, "domains")),
            _rate(whole, "download_kbit_per_second"),
            _rate(whole, "upload_kbit_per_second"),
        )


OPEN_POLICY = NetworkPolicy()
"""What a sandbox has that nobody has said anything of: the internet, and nothing else."""
CLOSED_POLICY = NetworkPolicy(EgressPolicy(EgressMode.NONE))


@dataclass(frozen=True, slots=True)
class NetworkUsage:
    """Since the slot was taken, from the sandbox's view. ``refused_packets``: sent, and kept back by the policy."""

    received_bytes: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    sent_packets: int = 0
    refused_packets: int = 0


def parse_network(text: str) -> IPv4Network:
    """An IPv4 network in CIDR notation, or a single address. Raises InvalidRequestError."""
    shown = _shown(text)
    try:
        network = ip_network(text.strip())
    except ValueError as error:
        hint = "write it as 203.0.113.0/24 or 203.0.113.7"
        if "host bits" in str(error):
            hint = f"did you mean {ip_network(text.strip(), strict=False)}?"
        raise InvalidRequestError(f"{shown} is no network", code="invalid_network", hint=hint) from error
    if isinstance(network, IPv6Network):
        raise InvalidRequestError(
            f"{shown}: sandboxes have no IPv6", code="invalid_network", hint="give the IPv4 network"
        )
    for closed in _NEVER_ALLOWED:
        if network.overlaps(closed) and network.prefixlen > 0:
            raise InvalidRequestError(
                f"{shown} overlaps with {closed}, which no sandbox may reach", code="invalid_network"
            )
    return network


def parse_domain(text: str) -> str:
    """``example.com``, or ``*.example.com`` for all names below it; in lower case. Raises InvalidRequestError."""
    shown = _shown(text)
    name = text.strip().lower().removesuffix(".")
    if not name.isascii():
        raise InvalidRequestError(
            f"{shown} is not written in ASCII",
            code="invalid_domain",
            hint="give the form that begins with xn-- (what a browser sends)",
        )
    labels = name.removeprefix("*.").split(".")
    if "*" in name.removeprefix("*."):
        raise InvalidRequestError(
            f"{shown}: '*' may only stand for the whole beginning of a name",
            code="invalid_domain",
            hint="*.example.com allows every name below example.com",
        )
    if len(name) > _DOMAIN_MAX_LENGTH or len(labels) < 2 or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidRequestError(
            f"{shown} is no domain name", code="invalid_domain", hint="write it as example.com or *.example.com"
        )
    if labels[-1].isdigit():
        raise InvalidRequestError(f"{shown} is no domain name", code="invalid_domain", hint="is it an address?")
    return name


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}…")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(f"{what} is an object")
    return cast("dict[str, Any]", value)


def _texts(value: dict[str, Any], name: str) -> list[str]:
    texts: object = value.get(name, [])
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in cast("list[object]", texts)):
        raise _malformed(f"egress.{name} is a list of strings")
    return cast("list[str]", texts)


def _rate(value: dict[str, Any], name: str) -> int | None:
    rate = value.get(name)
    if rate is not None and (not isinstance(rate, int) or isinstance(rate, bool)):
        raise _malformed(f"{name} is a number, or null")
    return rate


def _malformed(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_network_policy")
