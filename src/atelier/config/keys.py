"""Every key of the configuration file, once: what it is called, what it may bear, which variable overrides it.

Reading, the JSON schema and the template are all made of this table. A key of ``host`` has no variable: ``atelier host``
alone reads those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class KeyKind(StrEnum):
    """How TOML writes it."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    STRINGS = "array"


@dataclass(frozen=True, slots=True)
class Key:
    """``example`` is TOML, shown commented out in the template; ``choices``: empty for any value of the kind."""

    section: str
    name: str
    variable: str
    description: str
    example: str
    kind: KeyKind = KeyKind.STRING
    choices: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}"


SECTIONS = {
    "server": "The manager: where it listens, and where it keeps what.",
    "vmm": "What runs the virtual machines.",
    "network": "The sandboxes' network.",
    "storage": "The sandboxes' disks.",
    "ssh": "SSH into sandboxes.",
    "previews": "Web pages of sandboxes.",
    "limits": "What one caller may ask for, and one sandbox may take.",
    "sign_in": "Who may sign in with a browser. See docs/how-to/sign-in.md.",
    "host": "What `atelier host init` makes of this machine. Nothing else reads it.",
}

_NUMBER = KeyKind.NUMBER
_STRINGS = KeyKind.STRINGS

KEYS = (
    Key("server", "mode", "ATELIER_SERVER_MODE", "Which drivers.", '"production"', choices=("local", "production", "mock")),
    Key("server", "listen", "ATELIER_LISTEN", "Where the API listens, ADDRESS:PORT.", '"127.0.0.1:7420"'),
    Key("server", "public_url", "ATELIER_PUBLIC_URL", "Where people reach it.", '"https://atelier.example.org"'),
    Key("server", "data_dir", "ATELIER_DATA_DIR", "Database, volumes, keys.", '"/var/lib/atelier/data"'),
    Key("server", "cache_dir", "ATELIER_CACHE_DIR", "Images and kernels.", '"/var/lib/atelier/cache"'),
    Key("server", "run_dir", "ATELIER_RUN_DIR", "Sockets.", '"/run/atelier"'),
    Key("server", "recipes_dir", "ATELIER_RECIPES_DIR", "Recipes of images.", '"/opt/atelier/recipes"'),
    Key("server", "log_level", "ATELIER_LOG_LEVEL", "How much is logged.", '"INFO"',
        choices=("DEBUG", "INFO", "WARNING", "ERROR")),
    Key("server", "templates", "ATELIER_TEMPLATES", "Whether creates are restored from a template.", '"on"',
        choices=("on", "off")),
    Key("server", "guest_kernel", "ATELIER_GUEST_KERNEL",
        "debian: Debian's; own: compiled from Debian's source, all built in.", '"debian"', choices=("debian", "own")),
    Key("server", "companions", "ATELIER_COMPANIONS",
        "Who runs gateway and network holder: the manager itself (kept), or the host's service manager (services).",
        '"services"', choices=("kept", "services")),
    Key("vmm", "kind", "ATELIER_VMM", "auto: Firecracker where it is installed, else QEMU.", '"auto"',
        choices=("auto", "firecracker", "qemu")),
    Key("vmm", "accelerator", "ATELIER_ACCELERATOR", "auto: KVM where it really boots a guest.", '"auto"',
        choices=("auto", "kvm", "tcg")),
    Key("vmm", "firecracker", "ATELIER_FIRECRACKER", "The VMM's program.", '"/usr/local/lib/atelier/firecracker"'),
    Key("vmm", "jailer", "ATELIER_JAILER", "The jailer's program.", '"/usr/local/lib/atelier/jailer"'),
    Key("vmm", "jails_dir", "ATELIER_JAILS_DIR", "Where jails are made: on the file system of data and cache.",
        '"/var/lib/atelier/jails"'),
    Key("network", "kind", "ATELIER_NETWORK", "bridge: the internet and nothing else; closed: no way out.", '"bridge"',
        choices=("auto", "closed", "bridge")),
    Key("network", "home", "ATELIER_NETWORK_HOME", "Where the bridge is: private (a namespace) or host.", '"host"',
        choices=("private", "host")),
    Key("network", "bridge_name", "ATELIER_BRIDGE_NAME", "What the bridge is called.", '"br0"'),
    Key("storage", "kind", "ATELIER_STORAGE", "lvm-thin: volumes of the thin pool; qcow2: files in data_dir.", '"lvm-thin"', choices=("qcow2", "lvm-thin")),
    Key("storage", "volume_group", "ATELIER_VOLUME_GROUP", "The LVM volume group of the sandboxes' disks.", '"atelier"'),
    Key("storage", "thin_pool", "ATELIER_THIN_POOL", "The thin pool in it.", '"atelier"'),
    Key("storage", "disk_overcommit", "ATELIER_DISK_OVERCOMMIT",
        "How many times the room on disk may be promised, 1 to 1000.", "1.0", _NUMBER),
    Key("ssh", "listen", "ATELIER_SSH_LISTEN", "Where SSH is served, ADDRESS:PORT, or off.", '"0.0.0.0:2222"'),
    Key("previews", "domain", "ATELIER_SANDBOX_DOMAIN", "Previews are names below it.", '"sandboxes.example.org"'),
    Key("previews", "listen", "ATELIER_PREVIEWS_LISTEN", "ADDRESS:PORT, off, or unix: and a path for a proxy.",
        '"unix:/run/atelier-edge/previews.sock"'),
    Key("limits", "requests_per_second", "ATELIER_REQUESTS_PER_SECOND", "Of one key; 0: no limit.", "500", _NUMBER),
    Key("limits", "sign_ins_per_minute", "ATELIER_SIGN_INS_PER_MINUTE", "Of one address; 0: no limit.", "30", _NUMBER),
    Key("limits", "web_sockets_per_key", "ATELIER_WEB_SOCKETS_PER_KEY", "Of one key; 0: no limit.", "256",
        KeyKind.INTEGER),
    Key("limits", "disk_mib_per_second", "ATELIER_DISK_MIB_PER_SECOND", "Of one sandbox's disk; 0: no limit.", "200",
        _NUMBER),
    Key("limits", "disk_operations_per_second", "ATELIER_DISK_OPERATIONS_PER_SECOND",
        "Of one sandbox's disk; 0: no limit.", "5000", _NUMBER),
    Key("sign_in", "github_client_id", "ATELIER_GITHUB_CLIENT_ID", "Of a GitHub OAuth application.", '""'),
    Key("sign_in", "github_client_secret", "ATELIER_GITHUB_CLIENT_SECRET", "The secret of it.", '""'),
    Key("sign_in", "github_organizations", "ATELIER_GITHUB_ORGANIZATIONS", "Whose members may enter.", "[]", _STRINGS),
    Key("sign_in", "github_url", "ATELIER_GITHUB_URL", "GitHub, or one's own.", '"https://github.com"'),
    Key("sign_in", "oidc_issuer", "ATELIER_OIDC_ISSUER", "An OpenID Connect provider.", '"https://id.example.org"'),
    Key("sign_in", "oidc_client_id", "ATELIER_OIDC_CLIENT_ID", "The client there.", '""'),
    Key("sign_in", "oidc_client_secret", "ATELIER_OIDC_CLIENT_SECRET", "The secret of it.", '""'),
    Key("sign_in", "oidc_title", "ATELIER_OIDC_TITLE", "What the button says.", '"single sign-on"'),
    Key("sign_in", "emails", "ATELIER_SIGN_IN_EMAILS", "Who may enter.", '["ada@example.org"]', _STRINGS),
    Key("sign_in", "domains", "ATELIER_SIGN_IN_DOMAINS", "Whose addresses may enter.", '["example.org"]', _STRINGS),
    Key("host", "user", "", "The account that Atelier runs as; made by init.", '"atelier"'),
    Key("host", "storage_device", "", "An empty disk or partition for storage.volume_group.", '"/dev/nvme1n1"'),
    Key("host", "loop_file", "", "For trials, instead of a device: a file that the volume group lies in.",
        '"/var/lib/atelier/pool.img"'),
    Key("host", "loop_size_gib", "", "How large that file is, in GiB.", "20", KeyKind.INTEGER),
    Key("host", "firecracker", "",
        "A release of Firecracker: its .tgz, or a folder with firecracker and jailer, as a path or an https: address.",
        '"/root/firecracker-v1.12.0-x86_64.tgz"'),
    Key("host", "firecracker_sha256", "", "The checksum of the .tgz; an address wants one.", '""'),
    Key("host", "caddy", "", "Whether Caddy is installed and set up in front.", "true", KeyKind.BOOLEAN),
    Key("host", "caddy_tls", "", "Where Caddy has its certificate from: a file beside deploy/caddy/Caddyfile.",
        '"tls-acme-dns"', choices=("tls-own-certificate", "tls-acme-dns", "tls-internal")),
)  # fmt: skip

BY_PATH = {key.path: key for key in KEYS}

_CAPITAL = re.compile(r"(?<=[a-z0-9])([A-Z])")


def to_snake_case(name: str) -> str:
    """``bridgeName`` as ``bridge_name``: the other spelling that every key may have."""
    return _CAPITAL.sub(lambda found: f"_{found[1].lower()}", name)
