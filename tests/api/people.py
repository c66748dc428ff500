"""The people of the tests of rights: their keys, and clients that speak for them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import httpx
from tests.running_manager import RunningManager


@dataclass(frozen=True)
class Person:
    user_id: str
    email: str
    key: str
    url: str

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=30, verify=False
        )


def add_person(manager: RunningManager, name: str, **wishes: object) -> Person:
    """A new member with a key; ``wishes`` are for the key."""
    email = f"{name}-{secrets.token_hex(4)}@example.org"
    with manager.client() as admin:
        user = admin.post("/api/v1/users", json={"email": email, "name": name})
        assert user.status_code == 201, user.text
        key = admin.post("/api/v1/api-keys", json={"name": "test", "user": email, **wishes})
        assert key.status_code == 201, key.text
    return Person(user.json()["id"], email, key.json()["key"], manager.url)
