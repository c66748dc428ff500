"""What the network of an installation is called on the host. Everything bears the installation's id; what bears another
name is never touched.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from atelier.model.address_plan import LINK_NAME_MAX_LENGTH, is_link_name
from atelier.model.errors import InvalidRequestError
from atelier.model.ids import ID_ALPHABET, INSTALLATION_ID_LENGTH

_INSTALLATION_ID = re.compile(rf"[{ID_ALPHABET}]{{{INSTALLATION_ID_LENGTH}}}")
_TAP_ID_LENGTH = 8


@dataclass(frozen=True, slots=True)
class NetworkNames:
    """Raises InvalidRequestError for an id or a bridge's name that is none."""

    installation_id: str
    bridge: str

    def __post_init__(self) -> None:
        if _INSTALLATION_ID.fullmatch(self.installation_id) is None:
            raise InvalidRequestError(f"{self.installation_id!r} is no installation id")
        if not is_link_name(self.bridge) or self.bridge.startswith(self.link_prefix):
            raise InvalidRequestError(
                f"{self.bridge!r} cannot be the bridge's name",
                code="invalid_setting",
                hint=f"at most {LINK_NAME_MAX_LENGTH} letters, digits, '.', '_' or '-', not beginning with {self.link_prefix}",
            )

    @property
    def link_prefix(self) -> str:
        return f"at{self.installation_id}"

    @property
    def namespace(self) -> str:
        return f"at-{self.installation_id}"

    @property
    def table(self) -> str:
        """Of nftables, in each namespace and family."""
        return f"atelier_{self.installation_id}"

    @property
    def bridge_alias(self) -> str:
        """By which a bridge is known as this installation's."""
        return f"atelier {self.installation_id}"

    @property
    def tap_group(self) -> int:
        """The group of links in which the TAPs are, and nothing of anybody else's."""
        return 1 << 30 | zlib.crc32(self.bridge_alias.encode()) >> 3 << 1

    @property
    def freed_group(self) -> int:
        """Where those move that are to be deleted."""
        return self.tap_group + 1

    @property
    def uplink_host(self) -> str:
        # No sandbox id has a hyphen, so it cannot be taken for a TAP.
        return f"{self.link_prefix}-host"

    @property
    def uplink_home(self) -> str:
        return f"{self.link_prefix}-home"

    def tap(self, sandbox_id: str) -> str:
        return f"{self.link_prefix}{sandbox_id[:_TAP_ID_LENGTH]}"

    def is_tap(self, link: str) -> bool:
        return link.startswith(self.link_prefix) and "-" not in link
