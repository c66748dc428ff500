"""What the manager keeps for a while only: audit entries, keys of requests that were sent once, browser sessions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from tests.api.manager_inside import ManagerInside
from tests.api.test_ssh_entry import services_of


def later(**by: float) -> datetime:
    return datetime.now(UTC) + timedelta(**by)


@pytest.mark.parametrize(("hours", "is_kept"), [(23, True), (25, False)])
async def test_the_key_of_a_request_is_good_for_a_day(inside: ManagerInside, hours: float, is_kept: bool) -> None:
    async def create() -> str:
        answer = await inside.client.post("/api/v1/sandboxes", json={}, headers={"Idempotency-Key": "once"})
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    made = await create()
    idempotency = services_of(inside).idempotency
    idempotency._now = lambda: later(hours=hours)
    await idempotency.trim()
    assert (await create() == made) is is_kept


async def test_audit_entries_are_kept_for_ninety_days(inside: ManagerInside) -> None:
    audit = services_of(inside).audit
    await inside.client.post("/api/v1/users", json={"email": "a@example.org"})

    async def kept() -> list[str]:
        answer = await inside.client.get("/api/v1/audit?operation=add_user")
        return [each["operation"] for each in answer.json()["items"]]

    for days, left in ((89, ["add_user"]), (91, [])):
        assert await kept() == ["add_user"]
        audit._now = lambda days=days: later(days=days)
        await audit.trim()
        assert await kept() == left


async def test_a_browser_session_ends_by_itself(inside: ManagerInside) -> None:
    services = services_of(inside)
    (admin,) = services.accounts.list_users()
    _, token = await services.accounts.open_session(admin.id, "oidc", "192.0.2.1")

    async def status() -> tuple[int, str]:
        headers = {"Cookie": f"atelier_session={token}", "Authorization": ""}
        answer = await inside.client.get("/api/v1/whoami", headers=headers)
        return answer.status_code, answer.json().get("code", "")

    assert await status() == (200, "")
    services.authenticator._now = lambda: later(days=400)
    assert await status() == (401, "session_expired")
    services.accounts._now = services.authenticator._now
    await services.accounts.trim()
    services.authenticator._now = lambda: datetime.now(UTC)
    assert (await status())[0] == 401, "it is gone, whatever the clock says then"
