"""Who may enter a sandbox by SSH, and what is done for it: beside ``tests/vm/test_ssh.py``, in all states and for all people."""

from __future__ import annotations

import pytest
from tests.api.manager_inside import ManagerInside
from tests.api.test_ssh_key_routes import ED25519

from atelier.api.authentication import Gate
from atelier.api.services import Services
from atelier.model.errors import AccessDeniedError, PreconditionError

BLOB = ED25519.split()[1]


def services_of(inside: ManagerInside) -> Services:
    gate = inside.installation.application
    assert isinstance(gate, Gate)
    return gate._services


async def register(inside: ManagerInside, **wishes: str) -> str:
    answer = await inside.client.post("/api/v1/ssh-keys", json={"public_key": ED25519, **wishes})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


async def create(inside: ManagerInside, name: str) -> str:
    answer = await inside.client.post("/api/v1/sandboxes?wait=true", json={"name": name})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


async def state(inside: ManagerInside, sandbox: str) -> str:
    return (await inside.client.get(f"/api/v1/sandboxes/{sandbox}")).json()["state"]


@pytest.mark.parametrize(("order", "became"), [("stop", "stopped"), ("pause", "paused")])
async def test_what_sleeps_is_woken(inside: ManagerInside, order: str, became: str) -> None:
    await register(inside)
    sandbox = await create(inside, "box")
    await inside.client.post(f"/api/v1/sandboxes/{sandbox}/{order}?wait=true")
    assert await state(inside, sandbox) == became
    services = services_of(inside)
    assert services.ssh_keys.find_entry("box", BLOB).sandbox_id == sandbox
    assert await state(inside, sandbox) == became, "that somebody asks who may enter wakes nothing"
    await services.ssh_entry.enter(sandbox, BLOB, "192.0.2.1")
    assert await state(inside, sandbox) == "running"
    audit = (await inside.client.get("/api/v1/audit?operation=enter_by_ssh")).json()["items"]
    assert [(each["subject"], each["address"]) for each in audit] == [(sandbox, "192.0.2.1")]
    assert audit[0]["through"].startswith("ssh key ")


async def test_what_is_being_put_to_sleep_is_waited_for_and_woken(inside: ManagerInside) -> None:
    await register(inside)
    sandbox = await create(inside, "box")
    await inside.client.post(f"/api/v1/sandboxes/{sandbox}/stop")
    await services_of(inside).ssh_entry.enter(sandbox, BLOB, "192.0.2.1")
    assert await state(inside, sandbox) == "running"


async def test_what_cannot_be_woken_is_said(inside: ManagerInside) -> None:
    await register(inside)
    sandbox = await create(inside, "box")
    await inside.client.post(f"/api/v1/sandboxes/{sandbox}/stop?wait=true")
    inside.vmm.faults.fail_next("ensure_started", times=100)
    with pytest.raises(PreconditionError, match="box is failed") as refused:
        await services_of(inside).ssh_entry.enter(sandbox, BLOB, "192.0.2.1")
    assert refused.value.code == "sandbox_not_running"
    assert "atelier start box" in refused.value.hint


async def test_whose_key_opens_what(inside: ManagerInside) -> None:
    """A member's opens what is shared with them, for as long as it is and they are not removed; who loses the right between
    login and entering does not enter."""
    client, services = inside.client, services_of(inside)
    user = (await client.post("/api/v1/users", json={"email": "member@example.org"})).json()["id"]
    sandbox = await create(inside, "box")
    key = await register(inside, user=user)

    async def opens() -> bool:
        try:
            services.ssh_keys.find_entry("box", BLOB)
        except AccessDeniedError as error:
            assert error.code == "ssh_refused"
            with pytest.raises(AccessDeniedError):
                await services.ssh_entry.enter(sandbox, BLOB, "192.0.2.1")
            return False
        await services.ssh_entry.enter(sandbox, BLOB, "192.0.2.1")
        return True

    assert not await opens()
    await client.post(f"/api/v1/sandboxes/{sandbox}/shares", json={"user": user})
    assert await opens()
    await client.patch(f"/api/v1/users/{user}", json={"is_disabled": True})
    assert services.ssh_keys.find_holders(BLOB) == []
    assert not await opens()
    await client.patch(f"/api/v1/users/{user}", json={"is_disabled": False})
    assert await opens()
    await client.delete(f"/api/v1/sandboxes/{sandbox}/shares/{user}")
    assert not await opens()
    await client.delete(f"/api/v1/ssh-keys/{key}")
    await register(inside)
    assert await opens(), "an admin's opens all"
