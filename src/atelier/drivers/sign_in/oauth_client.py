"""Authlib's OAuth client, and what both providers do with it alike."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import AsyncGenerator
from typing import Any

import httpx

from atelier.drivers.sign_in.interface import SignInAttempt
from atelier.model.errors import AuthenticationError, IdentityProviderError

_TIMEOUT_SECONDS = 10.0


@contextlib.asynccontextmanager
async def oauth_client(
    title: str, client_id: str, client_secret: str, attempt: SignInAttempt, scope: str
) -> AsyncGenerator[Any]:
    """``authlib``'s client with PKCE. Inside, errors of transport and protocol become ours.

    Raises AuthenticationError (``sign_in_refused``), IdentityProviderError.
    """
    # Loaded at the first sign-in: most managers never see one. Authlib warns that it would rather use a later httpx.
    import authlib.deprecate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", authlib.deprecate.AuthlibDeprecationWarning)
        from authlib.integrations.base_client.errors import OAuthError
        from authlib.integrations.httpx_client import AsyncOAuth2Client

    # Its types do not say what it inherits from httpx.
    client_class: Any = AsyncOAuth2Client
    try:
        async with client_class(
            client_id,
            client_secret,
            scope=scope,
            redirect_uri=attempt.redirect_url,
            code_challenge_method="S256",
            timeout=_TIMEOUT_SECONDS,
        ) as client:
            yield client
    except OAuthError as error:
        raise AuthenticationError(
            f"{title} refuses the sign-in: {error.error}", code="sign_in_refused", hint="begin again, at /sign-in"
        ) from error
    # What is nonsense fails wherever it is first taken for what it should be.
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise IdentityProviderError(
            f"{title} does not answer as an identity provider does ({type(error).__name__})",
            hint="try again in a while; an admin can check the provider's address in the manager's settings",
        ) from error


def refuse(title: str, why: str) -> AuthenticationError:
    return AuthenticationError(
        f"the sign-in with {title} is refused: {why}", code="sign_in_refused", hint="begin again, at /sign-in"
    )
