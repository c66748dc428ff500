"""What the agent knows about its sandbox: token, default environment, default user and working directory.

Made by ``__main__``, filled by the guest channel (token) and ``/init``, read by every service. One per agent. It
touches nothing of the system itself.
"""

from __future__ import annotations

# hmac.compare_digest itself, without the 80 ms that hmac's import of OpenSSL takes in an emulated guest.
from _operator import _compare_digest  # pyright: ignore[reportPrivateUsage]
from typing import Final

from atelier.guest_agent.gate import Gate
from atelier.guest_agent.http import HttpError, Request
from atelier.guest_agent.users import User, UserDirectory, basic_user, resolve_path

DEFAULT_USER: Final = "user"


class AgentState:
    """``touches_system`` is False on a development host: ``/init`` then keeps off clock, hostname and machine-id."""

    def __init__(
        self,
        *,
        token: str = "",
        default_user: str = DEFAULT_USER,
        default_directory: str = "",
        touches_system: bool = True,
        users: UserDirectory | None = None,
    ) -> None:
        self.default_user = default_user
        self.default_directory = default_directory
        self.environment: dict[str, str] = {}
        self.touches_system = touches_system
        self.users = users or UserDirectory()
        self.gate = Gate()
        self._token = token

    @property
    def token(self) -> str:
        """The sandbox's access token; empty: none is set and nobody is asked for one."""
        return self._token

    def set_token(self, token: str) -> None:
        self._token = token

    def authorize(self, request: Request) -> None:
        """Raises HttpError 401 unless the request carries the token (header X-Access-Token), if one is set."""
        if not self.is_token(request.headers.get("x-access-token", "")):
            raise HttpError(401, "unauthenticated", "a valid X-Access-Token header is needed")

    def is_token(self, token: str) -> bool:
        """Whether ``token`` is the sandbox's, compared in constant time; any will do while none is set."""
        if not self._token:
            return True
        return _compare_digest(token.encode("utf-8", "surrogatepass"), self._token.encode("utf-8", "surrogatepass"))

    def user_of(self, request: Request, name: str = "") -> User:
        """Whom the request acts as: ``name``, else its Basic user, else the default one.

        A sandbox without a user called ``user`` (a foreign image) falls back on root, as long as no user was named.
        Raises ConnectError ``unauthenticated``.
        """
        named = name or basic_user(request.headers.get("authorization"))
        if named:
            return self.users.get(named)
        user = self.users.find(self.default_user)
        if user is None and self.default_user == DEFAULT_USER:
            user = self.users.find("root") or User("root", 0, 0, "/root", "/bin/sh", (0,))
        return user or self.users.get(self.default_user)

    def resolve(self, path: bytes | str, user: User) -> bytes:
        """``path`` made absolute: relative ones from the default working directory, else from the user's home."""
        return resolve_path(path, user, self.default_directory)
