"""Files of npm packages that pages need: fetched at first use, verified, kept in the cache by their content.

Made by ``manager.wiring``, called through ``interface.WebFiles``. Which packages, versions and files stands in a recipe with
each tarball's sha512 (``images/web/packages.json``), and no address: the tarballs come from the registry that npm is set to.
Verified at each reading, so that nothing of the cache is trusted. It runs nothing of what it fetches.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import ssl
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from atelier.host import command
from atelier.host.files import write_atomically
from atelier.model.errors import CommandError, MissingPackageError, MissingProgramError

_MAX_BYTES: Final = 32 * 1024 * 1024
_FETCH_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Package:
    name: str
    version: str
    integrity: str
    files: dict[str, str]

    @property
    def digest(self) -> bytes:
        return base64.b64decode(self.integrity.removeprefix("sha512-"))


class NpmPackages:
    """WebFiles of the packages in ``recipe``. ``registry``: its address without a slash at its end; empty: npm is asked."""

    def __init__(self, recipe: Path, cache: Path, registry: str) -> None:
        self._recipe = recipe
        self._cache = cache
        self._registry = registry
        self._files: dict[str, bytes] | None = None
        self._lock = asyncio.Lock()

    async def read(self, name: str) -> bytes | None:
        async with self._lock:
            if self._files is None:
                packages = _read_recipe(self._recipe)
                tarballs = [await self._tarball(package) for package in packages]
                pairs = zip(packages, tarballs, strict=True)
                self._files = {name: data for pair in pairs for name, data in _unpack(*pair).items()}
        return self._files.get(name)

    async def _tarball(self, package: _Package) -> bytes:
        path = self._cache / f"npm-{package.digest.hex()[:32]}.tgz"
        if path.is_file() and _is_good(package, data := path.read_bytes()):
            return data
        data = await self._fetch(package)
        if not _is_good(package, data):
            raise MissingPackageError(
                f"what the npm registry sent as {package.name} {package.version} is not that",
                hint="its sha512 is wrong: look at what stands between this machine and the registry",
            )
        self._cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, mode=0o444)
        return data

    async def _fetch(self, package: _Package) -> bytes:
        import httpx

        registry = self._registry or await _registry_of_npm()
        url = f"{registry}/{package.name}/-/{package.name.rpartition('/')[2]}-{package.version}.tgz"
        try:
            async with (
                asyncio.timeout(_FETCH_SECONDS),
                # The system's certificates, as npm is told to use where a company has one of its own.
                httpx.AsyncClient(verify=ssl.create_default_context(), follow_redirects=True) as client,
                client.stream("GET", url) as response,
            ):
                response.raise_for_status()
                pieces = bytearray()
                async for piece in response.aiter_bytes():
                    pieces += piece
                    if len(pieces) > _MAX_BYTES:
                        break
                return bytes(pieces)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            # Without the address: it may bear a password, and whoever looks at the page is told this.
            reason = str(error) or type(error).__name__
            if isinstance(error, httpx.HTTPStatusError):
                reason = f"the registry answers {error.response.status_code}"
            raise MissingPackageError(
                f"cannot fetch the npm package {package.name}: {reason}",
                hint="see that this machine reaches the registry that npm is set to (npm config get registry)",
            ) from error


async def _registry_of_npm() -> str:
    """Raises MissingPackageError where there is no npm that could say it."""
    try:
        answer = await command.run(["npm", "config", "get", "registry"], timeout_seconds=_FETCH_SECONDS)
    except (MissingProgramError, CommandError) as error:
        raise MissingPackageError(
            "the page's packages cannot be fetched: nothing says where npm packages come from",
            hint="set npm_config_registry, or registry in ~/.npmrc, to the address of an npm registry, or install npm",
        ) from error
    return answer.stdout.decode().strip().rstrip("/")


def _read_recipe(path: Path) -> list[_Package]:
    recipe: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
    return [_Package(name, **fields) for name, fields in recipe.items()]


def _is_good(package: _Package, data: bytes) -> bool:
    return hashlib.sha512(data).digest() == package.digest


def _unpack(package: _Package, tarball: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as archive:
        for name, member in package.files.items():
            file = archive.extractfile(f"package/{member}")
            assert file is not None, f"{package.name} has no {member}"
            found[name] = file.read()
    return found
