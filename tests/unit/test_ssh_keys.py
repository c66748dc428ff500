"""Public keys as people paste them: what is taken, what is refused, and in which words."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest

from atelier.model.errors import InvalidRequestError
from atelier.model.ssh_key import parse_public_key


def make_key(folder: Path, *options: str) -> Path:
    """The private key's file, made by ssh-keygen; the public one is beside it."""
    path = folder / "key"
    subprocess.run(
        ["ssh-keygen", "-q", "-N", "", "-C", "somebody@somewhere", "-f", str(path), *options], check=True, timeout=120
    )
    return path


@pytest.mark.parametrize(
    "options",
    [("-t", "ed25519"), ("-t", "ecdsa", "-b", "256"), ("-t", "ecdsa", "-b", "521"), ("-t", "rsa", "-b", "2048")],
)
def test_what_ssh_keygen_makes_is_taken(tmp_path: Path, options: tuple[str, ...]) -> None:
    public = make_key(tmp_path, *options).with_suffix(".pub")
    key = parse_public_key(public.read_text())
    assert key.comment == "somebody@somewhere"
    assert public.read_text().startswith(f"{key.line} ")
    shown = subprocess.run(["ssh-keygen", "-l", "-f", str(public)], capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] == key.fingerprint


def refusal(text: str) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_public_key(text)
    return caught.value


def test_a_private_key_is_refused_in_words(tmp_path: Path) -> None:
    error = refusal(make_key(tmp_path, "-t", "ed25519").read_text())
    assert error.code == "ssh_key_is_private"
    assert ".pub" in error.hint


def test_weak_keys_are_refused(tmp_path: Path) -> None:
    short = make_key(tmp_path, "-t", "rsa", "-b", "1024").with_suffix(".pub").read_text()
    assert refusal(short).code == "ssh_key_too_weak"
    assert refusal("ssh-dss AAAAB3NzaC1kc3MAAACB old").code == "ssh_key_too_weak"


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    line = make_key(tmp_path, "-t", "ed25519").with_suffix(".pub").read_text()
    kind, blob, comment = line.split()
    raw = base64.b64decode(blob)
    for text in (
        "",
        "hello",
        f"{kind} {blob[:-8]} {comment}",
        f"{kind} !!! {comment}",
        f"ecdsa-sha2-nistp256 {blob}",
        f"ssh-rsa {blob}",
        f"{kind} {base64.b64encode(raw + raw).decode()}",
        f"{kind} {base64.b64encode(b'xxxx').decode()}",
        f"{line}{line}",
        f"{kind} {blob} {'x' * 201}",
        f"{kind} {blob} \x1b[2J",
        f"ssh-ed25519-cert-v01@openssh.com {blob}",
        f'command="true" {line}',
        "x" * 20_000,
    ):
        assert refusal(text).code == "invalid_ssh_key", text[:100]
