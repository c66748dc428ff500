"""The real Caddy with the configuration of deploy/caddy, on a free port and with a certificate of the test's own."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.real_machines import REPOSITORY
from tests.running_manager import wait_until

# The one lies below the other: whoever asks for the manager must not be taken for a visitor of a sandbox.
DOMAIN, SANDBOX_DOMAIN = "manager.boxes.test", "boxes.test"
CONFIG = REPOSITORY / "deploy" / "caddy" / "Caddyfile"
NO_CADDY = "" if shutil.which("caddy") else "Caddy is not installed: scripts/setup development"


@dataclass(frozen=True)
class Caddy:
    port: int
    certificate: Path
    socket: Path
    """Where it finds the gateway."""
    tls: str = "tls-own-certificate"

    def variables(self) -> dict[str, str]:
        """The settings of a manager behind it."""
        return {
            "ATELIER_PUBLIC_URL": f"https://{DOMAIN}:{self.port}",
            "ATELIER_SANDBOX_DOMAIN": f"{SANDBOX_DOMAIN}:{self.port}",
            "ATELIER_PREVIEWS_LISTEN": f"unix:{self.socket}",
        }

    def connect(self, host: str) -> ssl.SSLSocket:
        """A connection with TLS, verified for ``host``."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), timeout=60), server_hostname=host)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key), for the domain and all names below the sandboxes'."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DOMAIN)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(each) for each in (DOMAIN, f"*.{SANDBOX_DOMAIN}")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "edge.crt", folder / "edge.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def prepare(folder: Path) -> Caddy:
    """What a manager has to know before Caddy runs."""
    return Caddy(free_port(), make_certificate(folder)[0], folder / "previews.sock")


def variables(caddy: Caddy, folder: Path) -> dict[str, str]:
    """The environment of Caddy's own, which keeps what it has to keep in ``folder``."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "ATELIER_DOMAIN": DOMAIN,
        "ATELIER_SANDBOX_DOMAIN": SANDBOX_DOMAIN,
        "ATELIER_HTTPS_PORT": str(caddy.port),
        "ATELIER_PREVIEWS_SOCKET": str(caddy.socket),
        "ATELIER_TLS": caddy.tls,
        "ATELIER_CERTIFICATE": str(caddy.certificate),
        "ATELIER_CERTIFICATE_KEY": str(caddy.certificate.with_suffix(".key")),
    }


@contextlib.contextmanager
def running(caddy: Caddy, folder: Path, manager_url: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"ATELIER_MANAGER": manager_url.removeprefix("http://"), **variables(caddy, folder)}
    with (folder / "caddy.log").open("wb") as log:
        process = subprocess.Popen(
            ["caddy", "run", "--config", str(CONFIG)], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:

            def listens() -> bool:
                assert process.poll() is None, (folder / "caddy.log").read_text()
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", caddy.port), 1).close()
                    return True
                return False

            wait_until(listens, 30)
            yield process
        finally:
            process.terminate()
            process.wait(30)
