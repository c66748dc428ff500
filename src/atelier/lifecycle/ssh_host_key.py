"""Makes SSH host keys for guests, on the host: an emulated guest would need seconds of its processor for one.

Called by the sandboxes' sagas. The one module that knows the ``cryptography`` package.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from atelier.model.guest import SshHostKey


def make_ssh_host_key() -> SshHostKey:
    """A fresh Ed25519 key, kept nowhere here."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return SshHostKey(private.decode(), public.decode())
