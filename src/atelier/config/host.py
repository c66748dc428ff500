"""What ``atelier host`` makes of a machine: the section ``host`` of the configuration file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from atelier.config.errors import InvalidSettingError
from atelier.config.file import ConfigFile

_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOP_MIN_GIB = 2


@dataclass(frozen=True, slots=True)
class Download:
    """``source``: a path or an https: address, empty for none; ``sha256``: empty if it is not to be checked."""

    source: str
    sha256: str


@dataclass(frozen=True, slots=True)
class HostSettings:
    """At most one of ``storage_device`` and ``loop_file`` is given; without both the volume group is somebody's who made
    it."""

    user: str
    storage_device: Path | None
    loop_file: Path | None
    loop_size_gib: int
    firecracker: Download
    has_caddy: bool
    caddy_tls: str


def load_host_settings(file: ConfigFile) -> HostSettings:
    """Raises InvalidSettingError that names file, line and key."""
    user = _text(file, "host.user") or "atelier"
    if not _USER.fullmatch(user) or user == "root":
        raise _refusal(file, "host.user", "a name of an account of its own: small letters, digits, _ and -")
    device, loop_file = _path(file, "host.storage_device"), _path(file, "host.loop_file")
    if device is not None and loop_file is not None:
        raise _refusal(file, "host.loop_file", "leave out host.storage_device, or this")
    group = file.get("storage.volume_group")
    if (device or loop_file) and not group:
        key = "host.storage_device" if device else "host.loop_file"
        raise _refusal(file, key, "say what the volume group on it is to be called: storage.volume_group")
    size = file.get("host.loop_size_gib")
    if isinstance(size, int) and size < _LOOP_MIN_GIB:
        raise _refusal(file, "host.loop_size_gib", f"at least {_LOOP_MIN_GIB}")
    return HostSettings(
        user=user,
        storage_device=device,
        loop_file=loop_file,
        loop_size_gib=size if isinstance(size, int) else 20,
        firecracker=_download(file, "host.firecracker"),
        has_caddy=file.get("host.caddy") is True,
        caddy_tls=_text(file, "host.caddy_tls") or "tls-own-certificate",
    )


def _text(file: ConfigFile, path: str) -> str:
    value = file.get(path)
    return value if isinstance(value, str) else ""


def _path(file: ConfigFile, path: str) -> Path | None:
    text = _text(file, path)
    if text and (not text.startswith("/") or ".." in Path(text).parts):
        raise _refusal(file, path, "an absolute path")
    return Path(text) if text else None


def _download(file: ConfigFile, path: str) -> Download:
    source, sha256 = _text(file, path), _text(file, f"{path}_sha256").lower()
    if sha256 and not _SHA256.fullmatch(sha256):
        raise _refusal(file, f"{path}_sha256", "64 hexadecimal digits, as sha256sum prints them")
    if "://" in source and not source.startswith("https://"):
        raise _refusal(file, path, "a path, or an address that begins with https://")
    if "://" in source and not sha256:
        raise _refusal(file, path, f"what is fetched is checked: say its checksum, {path}_sha256")
    return Download(source, sha256)


def _refusal(file: ConfigFile, path: str, hint: str) -> InvalidSettingError:
    value = str(file.get(path))
    return InvalidSettingError("", value, message=f"{file.place_of(path)} is {value!r}", hint=hint)
