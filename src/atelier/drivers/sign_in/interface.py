"""Interface of the identity providers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from atelier.model.principal import SignedInPerson


@dataclass(frozen=True, slots=True)
class SignInAttempt:
    """What ties the answer to the question. ``redirect_url``: where the provider sends the browser back to;
    ``code_verifier``: PKCE's (RFC 7636)."""

    state: str
    nonce: str
    code_verifier: str
    redirect_url: str


class SignInProvider(Protocol):
    """``name`` stands in URLs and never changes; ``title`` is shown to people."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    async def make_url(self, attempt: SignInAttempt) -> str:
        """Where the browser is to go. Raises IdentityProviderError."""
        ...

    async def find_person(self, attempt: SignInAttempt, code: str) -> SignedInPerson:
        """Whom the provider means by ``code``. Raises AuthenticationError (``sign_in_refused``) when the provider does
        not stand by it, or for another attempt; IdentityProviderError."""
        ...
