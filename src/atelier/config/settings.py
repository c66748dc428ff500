"""The settings of an installation: the configuration file (``file``), overridden by environment variables, overridden by a
program's own options.

``ATELIER_SERVER_MODE``, ``ATELIER_DATA_DIR``, ``ATELIER_CACHE_DIR``, ``ATELIER_RUN_DIR``, ``ATELIER_LISTEN``, ``ATELIER_SSH_LISTEN``,
``ATELIER_ACCELERATOR``, ``ATELIER_NETWORK``, ``ATELIER_NETWORK_HOME``, ``ATELIER_BRIDGE_NAME``, ``ATELIER_RECIPES_DIR``,
``ATELIER_DISK_OVERCOMMIT``, ``ATELIER_STORAGE``, ``ATELIER_TEMPLATES``, ``ATELIER_GUEST_KERNEL``, ``ATELIER_LOG_LEVEL``,
``ATELIER_PUBLIC_URL``, ``ATELIER_REQUESTS_PER_SECOND``, ``ATELIER_SIGN_INS_PER_MINUTE``, ``ATELIER_WEB_SOCKETS_PER_KEY``,
``ATELIER_DISK_MIB_PER_SECOND``, ``ATELIER_DISK_OPERATIONS_PER_SECOND``.
Those of signing in stand in ``sign_in``, those of previews in ``previews``, those of a production host in ``production``. Nothing
defaults into a source checkout.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from atelier.config.addresses import ListenAddress, parse_listen
from atelier.config.choices import choose
from atelier.config.errors import InvalidSettingError
from atelier.config.file import ConfigFile, find_config_file
from atelier.config.npm import find_npm_registry
from atelier.config.previews import DEFAULT_PREVIEWS_LISTEN, PreviewSettings, load_previews
from atelier.config.production import ProductionSettings, load_production
from atelier.config.sign_in import SignInSettings, load_sign_in
from atelier.model.address_plan import LINK_NAME_MAX_LENGTH, is_link_name
from atelier.model.machine_limits import DiskRate

DEFAULT_LISTEN = "127.0.0.1:7420"
DEFAULT_SSH_LISTEN = "127.0.0.1:2222"
_RUN_HASH_DIGITS = 8


class ServerMode(StrEnum):
    """Which drivers ``manager.wiring`` chooses."""

    LOCAL = "local"
    PRODUCTION = "production"
    MOCK = "mock"


class Accelerator(StrEnum):
    """``auto``: KVM when a probe shows that it really boots a guest, else software emulation."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class NetworkChoice(StrEnum):
    """``bridge``: sandboxes have the internet, and nothing else; ``closed``: they have no way out; ``auto``: the bridge
    where this machine has what it takes, else closed."""

    AUTO = "auto"
    CLOSED = "closed"
    BRIDGE = "bridge"


class NetworkHome(StrEnum):
    """Where the bridge is: ``private``: in a namespace of the installation's; ``host``: beside the host's own links, which
    takes root."""

    PRIVATE = "private"
    HOST = "host"


class StorageChoice(StrEnum):
    """``qcow2``: disks are files in the data folder; ``lvm-thin``: thin volumes of the pool that root's settings name
    (``atelier host storage``)."""

    QCOW2 = "qcow2"
    LVM_THIN = "lvm-thin"


class TemplateChoice(StrEnum):
    """``on``: the first create of a kind boots, and a template is made of it in the background; those after it are
    restored from that. ``off``: every create boots."""

    ON = "on"
    OFF = "off"


class GuestKernelChoice(StrEnum):
    """``debian``: Debian's, unpacked, unless one of our own has been built before; ``own``: compiled from Debian's source,
    some ten processor minutes, once."""

    DEBIAN = "debian"
    OWN = "own"


@dataclass(frozen=True, slots=True)
class Settings:
    mode: ServerMode
    data_dir: Path
    cache_dir: Path
    run_dir: Path
    listen: ListenAddress
    ssh_listen: ListenAddress | None
    """Where SSH is served; None: nowhere."""
    previews: PreviewSettings
    accelerator: Accelerator
    network: NetworkChoice
    network_home: NetworkHome
    bridge_name: str
    recipes_dir: Path
    disk_overcommit: float
    storage: StorageChoice
    templates: TemplateChoice
    guest_kernel: GuestKernelChoice
    log_level: str
    public_url: str
    """Where people reach this manager; empty: where it listens."""
    requests_per_second: float
    sign_ins_per_minute: float
    web_sockets_per_key: int
    disk_rate: DiskRate
    npm_registry: str
    sign_in: SignInSettings
    production: ProductionSettings


def load_settings(
    *, mode: str = "", data_dir: str = "", listen: str = "", environment: Mapping[str, str] | None = None
) -> Settings:
    """An option that is not empty wins over its variable, and that over the file.

    Raises InvalidSettingError that names the variable, or file, line and key, and what it may hold; and what
    ``find_config_file`` raises.
    """
    own = os.environ if environment is None else environment
    return load_settings_of(find_config_file(own), own, mode=mode, data_dir=data_dir, listen=listen)


def load_settings_of(
    file: ConfigFile,
    variables: Mapping[str, str] | None = None,
    *,
    mode: str = "",
    data_dir: str = "",
    listen: str = "",
) -> Settings:
    """Of a file that is read already. Without ``variables`` nothing else has a say: what a service will find."""
    own = variables or {}
    try:
        return _load({**file.variables(), **own}, mode=mode, data_dir=data_dir, listen=listen)
    except InvalidSettingError as error:
        place = "" if error.variable in own else file.place(error.variable)
        if not place:
            raise
        message = f"{place} is {error.value!r}"
        raise InvalidSettingError(error.variable, error.value, message=message, hint=error.hint) from error


def _load(variables: Mapping[str, str], *, mode: str, data_dir: str, listen: str) -> Settings:
    home = Path(variables.get("HOME") or Path.home())
    data = _folder(data_dir or variables.get("ATELIER_DATA_DIR", ""), variables, "XDG_DATA_HOME", home / ".local/share")
    cache = _folder(variables.get("ATELIER_CACHE_DIR", ""), variables, "XDG_CACHE_HOME", home / ".cache")
    listens_at = parse_listen(listen or variables.get("ATELIER_LISTEN", DEFAULT_LISTEN))
    public_url = _public_url(variables.get("ATELIER_PUBLIC_URL", ""))
    return Settings(
        mode=choose(ServerMode, variables, "ATELIER_SERVER_MODE", ServerMode.LOCAL, mode),
        data_dir=data,
        cache_dir=cache,
        run_dir=run_directory(data, variables),
        listen=listens_at,
        ssh_listen=_ssh_listen(variables.get("ATELIER_SSH_LISTEN") or DEFAULT_SSH_LISTEN),
        previews=load_previews(
            variables.get("ATELIER_SANDBOX_DOMAIN", ""),
            variables.get("ATELIER_PREVIEWS_LISTEN", ""),
            public_url,
            # Beside a manager that is not at the usual place, as a second one, they are not either.
            DEFAULT_PREVIEWS_LISTEN if str(listens_at) == DEFAULT_LISTEN else "127.0.0.1:0",
        ),
        accelerator=choose(Accelerator, variables, "ATELIER_ACCELERATOR", Accelerator.AUTO),
        network=choose(NetworkChoice, variables, "ATELIER_NETWORK", NetworkChoice.AUTO),
        network_home=choose(NetworkHome, variables, "ATELIER_NETWORK_HOME", NetworkHome.PRIVATE),
        bridge_name=_bridge_name(variables.get("ATELIER_BRIDGE_NAME", "br0")),
        recipes_dir=_recipes_directory(variables),
        disk_overcommit=_overcommit(variables.get("ATELIER_DISK_OVERCOMMIT", "1")),
        storage=choose(StorageChoice, variables, "ATELIER_STORAGE", StorageChoice.QCOW2),
        templates=choose(TemplateChoice, variables, "ATELIER_TEMPLATES", TemplateChoice.ON),
        guest_kernel=choose(GuestKernelChoice, variables, "ATELIER_GUEST_KERNEL", GuestKernelChoice.DEBIAN),
        log_level=variables.get("ATELIER_LOG_LEVEL", "INFO").upper(),
        public_url=public_url,
        requests_per_second=_limit(variables, "ATELIER_REQUESTS_PER_SECOND", "500"),
        sign_ins_per_minute=_limit(variables, "ATELIER_SIGN_INS_PER_MINUTE", "30"),
        web_sockets_per_key=int(_limit(variables, "ATELIER_WEB_SOCKETS_PER_KEY", "256")),
        disk_rate=_disk_rate(variables),
        npm_registry=find_npm_registry(variables, home),
        sign_in=load_sign_in(variables),
        production=load_production(variables, data),
    )


def run_directory(data_dir: Path, variables: Mapping[str, str]) -> Path:
    """``ATELIER_RUN_DIR``, else ``/run/atelier`` (root), ``$XDG_RUNTIME_DIR/atelier`` or ``/tmp/atelier-<uid>``; below
    it a folder named by 8 hex digits of the data folder's hash, so that two installations never meet."""
    if given := variables.get("ATELIER_RUN_DIR", ""):
        parent = Path(given)
    elif os.geteuid() == 0:
        parent = Path("/run/atelier")
    elif runtime := variables.get("XDG_RUNTIME_DIR", ""):
        parent = Path(runtime) / "atelier"
    else:
        parent = Path(f"/tmp/atelier-{os.geteuid()}")  # noqa: S108  made with mode 0700 and its owner checked
    digest = hashlib.sha256(bytes(data_dir.resolve())).hexdigest()
    return parent.absolute() / digest[:_RUN_HASH_DIGITS]


def _ssh_listen(text: str) -> ListenAddress | None:
    return None if text.strip().lower() == "off" else parse_listen(text, "ATELIER_SSH_LISTEN")


def _folder(given: str, variables: Mapping[str, str], xdg_variable: str, default: Path) -> Path:
    if given:
        return Path(given).absolute()
    xdg = variables.get(xdg_variable, "")
    # Source: XDG base directory specification: a relative path is to be ignored.
    return (Path(xdg) if xdg.startswith("/") else default) / "atelier"


def _recipes_directory(variables: Mapping[str, str]) -> Path:
    """Image recipes: ``ATELIER_RECIPES_DIR``, the checkout's ``images/``, or where the wheel installed them."""
    if given := variables.get("ATELIER_RECIPES_DIR", ""):
        return Path(given).absolute()
    checkout = Path(__file__).resolve().parents[3] / "images"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "atelier" / "images"


def _bridge_name(text: str) -> str:
    if not is_link_name(text):
        raise InvalidSettingError(
            "ATELIER_BRIDGE_NAME",
            text,
            hint=f"at most {LINK_NAME_MAX_LENGTH} letters, digits, '.', '_' or '-', as br0",
        )
    return text


def _overcommit(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1000:
        raise InvalidSettingError(
            "ATELIER_DISK_OVERCOMMIT",
            text,
            hint="how many times the room on disk may be promised to sandboxes: a number from 1 to 1000",
        )
    return factor


def _public_url(text: str) -> str:
    parts = urlsplit(text)
    is_origin = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/")
    if text and (not is_origin or parts.query or parts.fragment or parts.username):
        raise InvalidSettingError(
            "ATELIER_PUBLIC_URL",
            text,
            hint="scheme and name, and a port if it is not the usual one, as https://atelier.example.org",
        )
    return text.rstrip("/").lower()


def _disk_rate(variables: Mapping[str, str]) -> DiskRate:
    bytes_per_second = int(_limit(variables, "ATELIER_DISK_MIB_PER_SECOND", "0") * 1024 * 1024)
    operations_per_second = int(_limit(variables, "ATELIER_DISK_OPERATIONS_PER_SECOND", "0"))
    return DiskRate(bytes_per_second or None, operations_per_second or None)


def _limit(variables: Mapping[str, str], name: str, default: str) -> float:
    text = variables.get(name, default)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit <= 1e6:
        raise InvalidSettingError(name, text, hint="a number up to 1000000; 0: no limit")
    return limit
