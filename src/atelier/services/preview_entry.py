"""Who may visit a preview, and what they are shown if they may not, or not now.

Asked by the gateway about each visitor whom it does not know, or not for a moment. Only what is said here lets anybody
into a sandbox by the web.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, urlsplit

from atelier.db.engine import Database
from atelier.db.previews import PreviewRepository, VisitedPort
from atelier.lifecycle.activity import Activity
from atelier.model.errors import AtelierError, AuthenticationError, ConflictError, NotFoundError
from atelier.model.preview import ENTER_PATH, OWN_PATHS, START_PATH, PreviewHost, Visibility, read_cookies
from atelier.model.preview_page import PreviewPage
from atelier.model.preview_visit import Admitted, Answered, Visit
from atelier.model.principal import Principal, Scope
from atelier.model.states import SandboxState
from atelier.services.access import AccessService
from atelier.services.audit import AuditLog
from atelier.services.authentication import Authenticator
from atelier.services.preview_passes import Pass, PreviewPasses
from atelier.services.previews import PreviewService
from atelier.services.sandboxes import SandboxService

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_PATH = re.compile(r"/(?![/\\])[\x21-\x7e]{0,2000}|/")
_STARTABLE = frozenset({SandboxState.STOPPED, SandboxState.FAILED})
_WOKEN = frozenset({SandboxState.PAUSED, SandboxState.RESUMING})
_AGAIN_SECONDS = 3


@dataclass(frozen=True, slots=True)
class _Visitor:
    """``principal`` None: nobody that we know, who comes by a link or to what is public."""

    principal: Principal | None = None


class _Refused(Exception):
    def __init__(self, page: PreviewPage) -> None:
        self.page = page


class PreviewEntry:
    """``manager_url``: where people reach the manager; set before anybody is let in."""

    def __init__(
        self,
        database: Database,
        previews: PreviewService,
        passes: PreviewPasses,
        authenticator: Authenticator,
        access: AccessService,
        sandboxes: SandboxService,
        activity: Activity,
        audit: AuditLog,
    ) -> None:
        self._database = database
        self._previews = previews
        self._passes = passes
        self._authenticator = authenticator
        self._access = access
        self._sandboxes = sandboxes
        self._activity = activity
        self._audit = audit
        self._ports = PreviewRepository()
        self.manager_url = ""

    async def decide(self, visit: Visit) -> Admitted | Answered:
        """What becomes of a request. Does not raise for anything a visitor sends."""
        try:
            return await self._decide(visit)
        except _Refused as refused:
            headers, body = refused.page.render(visit.accept)
            return Answered(refused.page.status, headers, body)

    def note_use(self, sandbox_id: str) -> None:
        self._activity.touch(sandbox_id)

    def find(self, host: str) -> tuple[PreviewHost, VisitedPort] | None:
        """The port that a host name leads to; None: there is no such sandbox."""
        named = self._previews.site.parse_host(host)
        if named is None:
            return None
        with self._database.read() as connection:
            port = self._ports.find(connection, named.sandbox, named.port)
        return None if port is None or port.state is SandboxState.DESTROYING else (named, port)

    async def _decide(self, visit: Visit) -> Admitted | Answered:
        found = self.find(visit.host)
        if found is None:
            raise _Refused(_unknown(visit.host))
        port = found[1]
        if visit.target.startswith(OWN_PATHS):
            return await self._answer_own(visit, port)
        visitor = self._admit(visit, port)
        if isinstance(visitor, Answered):
            return visitor
        if port.state in _WOKEN:
            port = await self._wake(port, visit)
        if port.state is not SandboxState.RUNNING:
            raise _Refused(_not_running(port, visitor, visit))
        self._activity.touch(port.sandbox_id)
        return Admitted(port.sandbox_id, port.sharing.port)

    # --- who they are -------------------------------------------------------------------------------------------------

    def _admit(self, visit: Visit, port: VisitedPort) -> _Visitor | Answered:
        """Who comes, if they may; an answer sends them where they become known. Raises _Refused."""
        if visit.key:
            try:
                principal = self._authenticator.by_key(visit.key)
            except AuthenticationError as error:
                raise _Refused(_no_entry(401, error.code, error.message, error.hint)) from error
            self._check_access(principal, port)
            return _Visitor(principal)
        by_cookie = self._read_cookies(visit, port)
        if by_cookie is not None:
            is_public = port.sharing.visibility is Visibility.PUBLIC
            is_unsafe = visit.is_upgrade or visit.method not in _SAFE_METHODS
            if is_unsafe and not is_public and not self._is_own_page(visit):
                raise _Refused(_no_entry(403, "wrong_origin", "This request came from a page of another address.", ""))
            return by_cookie
        if port.sharing.visibility is Visibility.PUBLIC:
            return _Visitor()
        if visit.method in ("GET", "HEAD") and not visit.is_upgrade and "text/html" in visit.accept:
            location = f"{self.manager_url}/previews/enter?host={quote(visit.host)}&next={quote(_path(visit.target))}"
            return _redirect(location)
        raise _Refused(
            _no_entry(
                401,
                "unauthenticated",
                "This preview is private.",
                "Open it in a browser and sign in, or send the header X-Atelier-Key with an API key.",
            )
        )

    def _read_cookies(self, visit: Visit, port: VisitedPort) -> _Visitor | None:
        """None: none is good any more, so they begin anew. Raises _Refused for somebody who is known, and may not."""
        refusal: _Refused | None = None
        for text in read_cookies(visit.cookies, self._previews.site.cookie)[:8]:
            granted = self._passes.read("cookie", text)
            if granted is None or not self._is_for(granted, port):
                continue
            if granted.is_by_link:
                if self._is_good_link(granted, port):
                    return _Visitor()
                continue
            with suppress(AuthenticationError):
                principal = self._authenticator.by_id(key_id=granted.key_id, session_id=granted.session_id)
                try:
                    self._check_access(principal, port)
                except _Refused as refused:
                    refusal = refused
                else:
                    return _Visitor(principal)
        if refusal is not None and port.sharing.visibility is not Visibility.PUBLIC:
            raise refusal
        return None

    @staticmethod
    def _is_for(granted: Pass, port: VisitedPort) -> bool:
        return (granted.sandbox_id, granted.port) == (port.sandbox_id, port.sharing.port)

    @staticmethod
    def _is_good_link(granted: Pass, port: VisitedPort) -> bool:
        is_open = port.sharing.visibility is not Visibility.PRIVATE
        return is_open and granted.generation == port.sharing.generation

    def _check_access(self, principal: Principal, port: VisitedPort) -> None:
        try:
            self._access.find_sandbox(principal, port.sandbox_id, as_owner=False)
        except NotFoundError as error:
            text = "This sandbox is not shared with you."
            raise _Refused(
                _no_entry(403, "access_denied", text, "Ask its owner to share it, or for a link.")
            ) from error
        if Scope.WRITE not in principal.scopes:
            raise _Refused(
                _no_entry(
                    403, "scope_missing", "This key is not good for using sandboxes.", "Use one with the scope write."
                )
            )

    def _is_own_page(self, visit: Visit) -> bool:
        return visit.origin == f"{self._previews.site.scheme}://{visit.host.lower()}"

    # --- ways in ------------------------------------------------------------------------------------------------------

    async def _answer_own(self, visit: Visit, port: VisitedPort) -> Answered:
        parts = urlsplit(visit.target)
        query = {name: values[0] for name, values in parse_qs(parts.query, max_num_fields=20).items()}
        onward = _path(query.get("next", "/"))
        if parts.path == ENTER_PATH and visit.method in ("GET", "HEAD"):
            return self._enter(visit, port, query, onward)
        if parts.path == START_PATH and visit.method == "POST":
            return await self._start(visit, port, onward)
        raise _Refused(PreviewPage(404, "not_found", "There is nothing here", "This address is Atelier's own."))

    def _enter(self, visit: Visit, port: VisitedPort, query: dict[str, str], onward: str) -> Answered:
        """Turn a code or a link into the preview's own cookie."""
        if code := query.get("code", ""):
            # A code that only a look was taken at, as programs do that preview links, would be used up.
            granted = self._passes.use_code(code) if visit.method == "GET" else None
            if granted is None or not self._is_for(granted, port):
                raise _Refused(
                    _no_entry(403, "code_used", "This way in was used already, or is over.", "Open the preview again.")
                )
            try:
                principal = self._authenticator.by_id(key_id=granted.key_id, session_id=granted.session_id)
            except AuthenticationError as error:
                raise _Refused(_no_entry(403, error.code, error.message, error.hint)) from error
            self._audit.note(principal, "enter_preview", f"{port.sandbox_id}/{granted.port}", 303, visit.address)
        else:
            granted = self._passes.read("link", query.get("link", ""))
            if granted is None or not self._is_for(granted, port) or not self._is_good_link(granted, port):
                raise _Refused(
                    _no_entry(
                        403,
                        "link_invalid",
                        "This link is not good, has expired or was taken back.",
                        "Ask whoever gave it to you for another.",
                    )
                )
            subject = f"{port.sandbox_id}/{granted.port}"
            self._audit.note(None, "enter_preview", subject, 303, visit.address, through="link")
        seconds = max(1, granted.until - int(self._passes.now().timestamp()))
        site = self._previews.site
        cookie = (
            f"{site.cookie}={self._passes.sign('cookie', granted)}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax"
        )
        return _redirect(onward, ("set-cookie", f"{cookie}; Secure" if site.scheme == "https" else cookie))

    async def _start(self, visit: Visit, port: VisitedPort, onward: str) -> Answered:
        """The button of the page that says that it is stopped."""
        visitor = self._read_cookies(visit, port)
        if visitor is None or visitor.principal is None or not self._is_own_page(visit):
            raise _Refused(
                _no_entry(
                    403, "wrong_origin", "Only the button of this page starts the sandbox.", "Go back and reload."
                )
            )
        self._audit.note(visitor.principal, "start_by_preview", port.sandbox_id, 303, visit.address)
        if port.state in _STARTABLE:
            try:
                with suppress(ConflictError):  # somebody else has begun the same meanwhile
                    await self._sandboxes.start(port.sandbox_id)
            except AtelierError as error:
                raise _Refused(_failed_to_start(port, error)) from error
        return _redirect(onward)

    async def _wake(self, port: VisitedPort, visit: Visit) -> VisitedPort:
        try:
            await self._sandboxes.wake(self._sandboxes.get(port.sandbox_id))
        except NotFoundError as error:
            raise _Refused(_unknown(visit.host)) from error
        except AtelierError as error:
            raise _Refused(_failed_to_start(port, error)) from error
        with self._database.read() as connection:
            found = self._ports.find(connection, port.sandbox_id, port.sharing.port)
        if found is None:
            raise _Refused(_unknown(visit.host))
        return found


def _path(target: str) -> str:
    """A path of the same host, whatever was asked for."""
    return target if _PATH.fullmatch(target) else "/"


def _redirect(location: str, *headers: tuple[str, str]) -> Answered:
    fixed = [("location", location), ("cache-control", "no-store"), ("content-length", "0")]
    return Answered(303, [*fixed, *headers], b"")


def _unknown(host: str) -> PreviewPage:
    return PreviewPage(
        404,
        "no_such_sandbox",
        "There is no such sandbox",
        f"{host[:100]} leads to no sandbox of this Atelier. It may have been destroyed.",
        "A preview's address begins with a port and the sandbox: 8080-box. See: atelier ports SANDBOX",
    )


def _no_entry(status: int, code: str, text: str, hint: str) -> PreviewPage:
    return PreviewPage(status, code, "You cannot enter here", text, hint)


def _failed_to_start(port: VisitedPort, error: AtelierError) -> PreviewPage:
    title = f"{port.sandbox_name} could not be started"
    return PreviewPage(503, error.code, title, error.message, error.hint, again_seconds=30)


def _not_running(port: VisitedPort, visitor: _Visitor, visit: Visit) -> PreviewPage:
    name, state = port.sandbox_name, port.state
    # What a link or nothing brings in does not start machines, nor hear what went wrong.
    is_known = visitor.principal is not None
    onward = _path(visit.target) if is_known and not visit.key else None
    if state is SandboxState.STOPPED:
        hint = "" if is_known else "Its owner can start it."
        return PreviewPage(503, "sandbox_stopped", f"{name} is stopped", "Its disk is as it was.", hint, onward)
    if state is SandboxState.FAILED:
        text = (port.failure_message if is_known else "") or "Its owner can see why."
        return PreviewPage(503, "sandbox_failed", f"{name} has failed", text, "", onward)
    text = "This page comes again by itself."
    return PreviewPage(503, f"sandbox_{state}", f"{name} is {state}", text, again_seconds=_AGAIN_SECONDS)
