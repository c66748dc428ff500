"""The routes of SSH keys: what is sent, and how the answer is read. Without I/O."""

from __future__ import annotations

from atelier.client.addresses import encode_query, encode_segment
from atelier.client.call import API, Call, make_body, read_model, read_nothing
from atelier.schemas.ssh import AddSshKeyRequest, SshAddress, SshKey, SshKeyList


def get_ssh() -> Call[SshAddress]:
    operation = "find out where SSH is served"
    return Call(operation, "GET", f"{API}/ssh", read_model(SshAddress, operation), repeatable=True)


def list_ssh_keys(*, everybodys: bool) -> Call[SshKeyList]:
    operation = "list the SSH keys"
    query = encode_query([("all", "true")] if everybodys else [])
    return Call(operation, "GET", f"{API}/ssh-keys{query}", read_model(SshKeyList, operation), repeatable=True)


def add_ssh_key(public_key: str, name: str | None, user: str | None) -> Call[SshKey]:
    operation = "add the SSH key"
    body = make_body(AddSshKeyRequest, operation, public_key=public_key, name=name, user=user)
    return Call(operation, "POST", f"{API}/ssh-keys", read_model(SshKey, operation), body)


def delete_ssh_key(key_id: str) -> Call[None]:
    return Call(
        f"delete the SSH key {key_id}", "DELETE", f"{API}/ssh-keys/{encode_segment(key_id, 'key')}", read_nothing
    )
