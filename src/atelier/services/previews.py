"""Ports of sandboxes: which there are, where they are visited, and by whom. Called by the routes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from urllib.parse import quote

from atelier.db.engine import Connection, Database
from atelier.db.previews import PreviewRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.model.errors import InvalidRequestError, NotFoundError, PreconditionError
from atelier.model.preview import ENTER_PATH, LOCAL_DOMAIN, PortSharing, PreviewSite, Visibility
from atelier.model.principal import Principal
from atelier.model.states import SandboxState
from atelier.services.preview_passes import Pass, PreviewPasses
from atelier.services.sandboxes import SandboxService

COOKIE_LIFETIME = timedelta(hours=12)
"""After it a browser is sent to the manager again, where it is known or signs in."""
LINK_MAX_LIFETIME = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class PreviewPort:
    """``is_open``: something listens there; None: the sandbox does not run, so nobody knows. ``url``: empty where previews
    are not served."""

    sharing: PortSharing
    is_open: bool | None
    url: str


@dataclass(frozen=True, slots=True)
class PreviewLink:
    url: str
    expires_at: datetime


class PreviewService:
    """``site``: where previews are served, as far as this is known."""

    def __init__(
        self, database: Database, sandboxes: SandboxService, guests: GuestDriver, passes: PreviewPasses
    ) -> None:
        self._database = database
        self._sandboxes = sandboxes
        self._guests = guests
        self._passes = passes
        self._previews = PreviewRepository()
        self.site = PreviewSite("http", LOCAL_DOMAIN, None, "previews are not served by this manager")

    async def list_ports(self, sandbox_id: str) -> list[PreviewPort]:
        """Those on which something listens, and those that are shared; by number.

        Raises NotFoundError, GuestUnreachableError, GuestError.
        """
        is_running = self._sandboxes.get(sandbox_id).state is SandboxState.RUNNING
        listening = await self._guests.list_ports(sandbox_id) if is_running else []
        with self._database.read() as connection:
            told = {each.port: each for each in self._previews.list_sharing(connection, sandbox_id)}
        shared = {port for port, each in told.items() if each.visibility is not Visibility.PRIVATE}
        return [
            PreviewPort(
                told.get(port, PortSharing(port)),
                port in listening if is_running else None,
                self.site.url(sandbox_id, port),
            )
            for port in sorted({*listening, *shared})
        ]

    def get_port(self, sandbox_id: str, port: int) -> PreviewPort:
        """Raises NotFoundError."""
        with self._database.read() as connection:
            sharing = self._get(connection, sandbox_id, port)
        return PreviewPort(sharing, None, self.site.url(sandbox_id, port))

    async def set_visibility(self, sandbox_id: str, port: int, visibility: Visibility) -> PreviewPort:
        """What was made private has no links any more, and gets none of them back. Raises NotFoundError."""

        def change(connection: Connection) -> PortSharing:
            before = self._get(connection, sandbox_id, port)
            is_cut = visibility is Visibility.PRIVATE
            after = replace(before, visibility=visibility, generation=before.generation + is_cut)
            self._previews.put(connection, sandbox_id, after)
            return after

        return PreviewPort(await self._database.write(change), None, self.site.url(sandbox_id, port))

    async def make_link(self, sandbox_id: str, port: int, expires_in_seconds: int) -> PreviewLink:
        """A link by which everybody enters who has it, until it expires or the port is made private. A private port then
        is one with links.

        Raises NotFoundError, PreconditionError (``no_previews``), InvalidRequestError (``invalid_expiry``).
        """
        self._check_site()
        lifetime = timedelta(seconds=expires_in_seconds)
        if not timedelta() < lifetime <= LINK_MAX_LIFETIME:
            raise InvalidRequestError(
                "a link is good for a second at least and a year at most", code="invalid_expiry", hint="as 7d"
            )

        def open_to_links(connection: Connection) -> PortSharing:
            before = self._get(connection, sandbox_id, port)
            if before.visibility is not Visibility.PRIVATE:
                return before
            after = replace(before, visibility=Visibility.LINK)
            self._previews.put(connection, sandbox_id, after)
            return after

        sharing = await self._database.write(open_to_links)
        expires_at = (self._passes.now() + lifetime).replace(microsecond=0)
        granted = Pass(sandbox_id, port, int(expires_at.timestamp()), generation=sharing.generation)
        token = self._passes.sign("link", granted)
        return PreviewLink(f"{self.site.url(sandbox_id, port)}{ENTER_PATH}?link={token}", expires_at)

    def make_visit(self, principal: Principal, sandbox: str, port: int, path: str = "/") -> str:
        """The URL by which a browser enters as the principal, within a minute, once. ``sandbox``: its id, or the name that
        it was asked for by. Raises NotFoundError, PreconditionError (``no_previews``)."""
        self._check_site()
        until = self._passes.now() + COOKIE_LIFETIME
        row = self._sandboxes.get(sandbox)
        granted = Pass(row.id, port, int(until.timestamp()), principal.key_id, principal.session_id)
        code = self._passes.make_code(granted)
        return f"{self.site.url(sandbox, port)}{ENTER_PATH}?code={code}&next={quote(path, safe='')}"

    async def trim(self) -> None:
        await self._database.write(self._previews.trim)

    def _get(self, connection: Connection, sandbox_id: str, port: int) -> PortSharing:
        found = self._previews.find(connection, sandbox_id, port)
        if found is None:
            raise NotFoundError(f"there is no sandbox {sandbox_id!r}", code="sandbox_not_found", hint="atelier ls")
        return found.sharing

    def _check_site(self) -> None:
        if self.site.problem:
            raise PreconditionError(
                f"previews are not served: {self.site.problem}",
                code="no_previews",
                hint="see docs/how-to/previews.md for ATELIER_PREVIEWS_LISTEN and ATELIER_SANDBOX_DOMAIN",
            )
