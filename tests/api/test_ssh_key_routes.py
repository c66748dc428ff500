"""Public keys for SSH over the API and the command line: whose they are, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.api.people import add_person
from tests.running_manager import RunningManager

ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPl3qU0qHXkfHvxP9KZfcSTNgPZRYIuxOqYqjkfDKgSv somebody@somewhere"


def test_keys_are_their_users_own(manager: RunningManager) -> None:
    one, other = add_person(manager, "ssh-one"), add_person(manager, "ssh-other")
    with one.client() as mine, other.client() as theirs, manager.client() as admin:
        made = mine.post("/api/v1/ssh-keys", json={"public_key": ED25519})
        assert made.status_code == 201, made.text
        key = made.json()
        assert key["name"] == "somebody@somewhere"
        assert key["fingerprint"].startswith("SHA256:")
        again = mine.post("/api/v1/ssh-keys", json={"public_key": ED25519})
        assert (again.status_code, again.json()["code"]) == (409, "ssh_key_exists")
        assert [each["id"] for each in mine.get("/api/v1/ssh-keys").json()["items"]] == [key["id"]]
        assert theirs.get("/api/v1/ssh-keys").json()["items"] == []
        assert theirs.delete(f"/api/v1/ssh-keys/{key['id']}").json()["code"] == "ssh_key_not_found"
        assert theirs.get("/api/v1/ssh-keys?all=true").json()["code"] == "admin_only"
        for_other = theirs.post("/api/v1/ssh-keys", json={"public_key": ED25519, "user": one.email})
        assert for_other.json()["code"] == "admin_only"
        assert key["id"] in [each["id"] for each in admin.get("/api/v1/ssh-keys?all=true").json()["items"]]
        assert admin.delete(f"/api/v1/ssh-keys/{key['id']}").status_code == 204
        assert mine.get("/api/v1/ssh-keys").json()["items"] == []


def test_bad_keys_are_refused_in_words(manager: RunningManager, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    with manager.client() as client:
        for text, code in (
            ((tmp_path / "key").read_text(), "ssh_key_is_private"),
            ("ssh-dss AAAA old", "ssh_key_too_weak"),
            ("hello", "invalid_ssh_key"),
            (ED25519.replace(" ", "\n"), "invalid_ssh_key"),
            ("", "invalid_request"),
        ):
            answer = client.post("/api/v1/ssh-keys", json={"public_key": text})
            assert (answer.status_code, answer.json()["code"]) == (422, code), text


def test_a_manager_without_guests_serves_no_ssh_and_says_so(manager: RunningManager) -> None:
    with manager.client() as client:
        answer = client.get("/api/v1/ssh").json()
    assert answer["port"] == 0
    assert answer["problem"]
