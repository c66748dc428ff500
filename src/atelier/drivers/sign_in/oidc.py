"""Any OpenID Connect provider. Source: OpenID Connect Core 1.0 (sections 3.1.2.1 and 3.1.3.7) and Discovery 1.0."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from atelier.drivers.sign_in.interface import SignInAttempt
from atelier.drivers.sign_in.oauth_client import oauth_client, refuse
from atelier.model.errors import IdentityProviderError
from atelier.model.principal import SignedInPerson

_SCOPE = "openid email profile"
_LEEWAY_SECONDS = 60
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA"]
"""Those with a public key alone: the provider's is known to everybody."""


class OidcProvider:
    name = "oidc"

    def __init__(self, issuer: str, client_id: str, client_secret: str, title: str) -> None:
        self.title = title
        self._issuer = issuer.rstrip("/")
        self._client_id = client_id
        self._client_secret = client_secret
        self._metadata: dict[str, Any] = {}

    async def make_url(self, attempt: SignInAttempt) -> str:
        async with self._client(attempt) as client:
            metadata = await self._discover(client)
            url, _ = client.create_authorization_url(
                metadata["authorization_endpoint"],
                state=attempt.state,
                nonce=attempt.nonce,
                code_verifier=attempt.code_verifier,
            )
            return str(url)

    async def find_person(self, attempt: SignInAttempt, code: str) -> SignedInPerson:
        async with self._client(attempt) as client:
            metadata = await self._discover(client)
            token = await client.fetch_token(metadata["token_endpoint"], code=code, code_verifier=attempt.code_verifier)
            answer = await client.request("GET", metadata["jwks_uri"], withhold_token=True)
            answer.raise_for_status()
            claims = await asyncio.to_thread(self._check, str(token.get("id_token", "")), answer.json(), attempt.nonce)
            if "email" not in claims and "userinfo_endpoint" in metadata:
                answer = await client.get(metadata["userinfo_endpoint"])
                answer.raise_for_status()
                said = answer.json()
                # Source: section 5.3.2: what is said of another subject must not be used.
                claims = {**said, **claims} if said.get("sub") == claims["sub"] else claims
        is_verified = claims.get("email_verified") is True
        return SignedInPerson(
            provider=self.name,
            subject=f"{self._issuer} {claims['sub']}",
            name=str(claims.get("name") or claims.get("preferred_username") or claims["sub"])[:100],
            email=str(claims.get("email", "")).lower() if is_verified else "",
        )

    def _client(self, attempt: SignInAttempt) -> Any:
        return oauth_client(self.title, self._client_id, self._client_secret, attempt, _SCOPE)

    async def _discover(self, client: Any) -> dict[str, Any]:
        if not self._metadata:
            answer = await client.request(
                "GET", f"{self._issuer}/.well-known/openid-configuration", withhold_token=True
            )
            answer.raise_for_status()
            metadata = cast("dict[str, Any]", answer.json())
            # Source: Discovery 1.0, section 4.3: it must be exactly the one that was asked.
            if str(metadata["issuer"]).rstrip("/") != self._issuer:
                raise IdentityProviderError(
                    f"{self.title} says that it is {metadata['issuer']}, not {self._issuer}",
                    hint="set ATELIER_OIDC_ISSUER to the issuer that the provider itself names",
                )
            self._metadata = metadata
        return self._metadata

    def _check(self, id_token: str, keys: Any, nonce: str) -> dict[str, Any]:
        """The claims, when signature, issuer, audience, time and nonce are right."""
        from joserfc import jwt
        from joserfc.errors import JoseError
        from joserfc.jwk import KeySet

        try:
            token = jwt.decode(id_token, KeySet.import_key_set(keys), algorithms=_ALGORITHMS)
            jwt.JWTClaimsRegistry(
                leeway=_LEEWAY_SECONDS,
                iss={"essential": True, "value": self._metadata["issuer"]},
                aud={"essential": True, "value": self._client_id},
                sub={"essential": True},
                exp={"essential": True},
                nonce={"essential": True, "value": nonce},
            ).validate(token.claims)
        except (JoseError, ValueError) as error:
            raise refuse(self.title, f"its ID token is not good ({getattr(error, 'error', 'malformed')})") from error
        if token.claims.get("azp", self._client_id) != self._client_id:
            raise refuse(self.title, "its ID token was issued to another program")
        return token.claims
