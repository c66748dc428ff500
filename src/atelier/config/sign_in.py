"""Who may sign in, and where: ``ATELIER_GITHUB_CLIENT_ID``, ``ATELIER_GITHUB_CLIENT_SECRET``,
``ATELIER_GITHUB_ORGANIZATIONS``, ``ATELIER_GITHUB_URL``, ``ATELIER_OIDC_ISSUER``, ``ATELIER_OIDC_CLIENT_ID``,
``ATELIER_OIDC_CLIENT_SECRET``, ``ATELIER_OIDC_TITLE``, ``ATELIER_SIGN_IN_EMAILS``, ``ATELIER_SIGN_IN_DOMAINS``.

Lists are separated by commas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from atelier.config.errors import InvalidSettingError


@dataclass(frozen=True, slots=True)
class SignInSettings:
    """An empty client id or issuer: that provider is not offered. ``emails`` and ``domains``: lower case."""

    github_client_id: str
    github_client_secret: str = field(repr=False)
    github_organizations: frozenset[str]
    github_url: str
    oidc_issuer: str
    oidc_client_id: str
    oidc_client_secret: str = field(repr=False)
    oidc_title: str
    emails: frozenset[str]
    domains: frozenset[str]


def load_sign_in(variables: Mapping[str, str]) -> SignInSettings:
    """Raises InvalidSettingError."""

    def read(name: str, default: str = "") -> str:
        return variables.get(f"ATELIER_{name}", "").strip() or default

    def read_list(name: str) -> frozenset[str]:
        return frozenset(each.strip().lower() for each in read(name).split(",") if each.strip())

    settings = SignInSettings(
        github_client_id=read("GITHUB_CLIENT_ID"),
        github_client_secret=read("GITHUB_CLIENT_SECRET"),
        github_organizations=read_list("GITHUB_ORGANIZATIONS"),
        github_url=read("GITHUB_URL", "https://github.com"),
        oidc_issuer=read("OIDC_ISSUER"),
        oidc_client_id=read("OIDC_CLIENT_ID"),
        oidc_client_secret=read("OIDC_CLIENT_SECRET"),
        oidc_title=read("OIDC_TITLE", "single sign-on"),
        emails=read_list("SIGN_IN_EMAILS"),
        domains=frozenset(each.removeprefix("@") for each in read_list("SIGN_IN_DOMAINS")),
    )
    for name, is_complete in (
        ("ATELIER_GITHUB_CLIENT_SECRET", not settings.github_client_id or settings.github_client_secret),
        ("ATELIER_OIDC_CLIENT_ID", not settings.oidc_issuer or settings.oidc_client_id),
    ):
        if not is_complete:
            raise InvalidSettingError(
                name, "", message=f"{name} is missing", hint="the provider gives it with the client id"
            )
    return settings
