"""Files of npm packages: where they come from, and that nothing but what the recipe names is ever shown or kept."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from atelier.config import npm
from atelier.config.npm import find_npm_registry
from atelier.drivers.images import npm_packages
from atelier.drivers.images.npm_packages import NpmPackages
from atelier.model.errors import MissingPackageError

PATH = "/@scope/tool/-/tool-1.2.3.tgz"


def tarball(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/lib/tool.js")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


GOOD = tarball(b"good()" * 1000)


class Registry:
    """Answers with ``status`` and ``body``; ``promised``: the length that it says, if another."""

    def __init__(self) -> None:
        self.status, self.body, self.promised = 200, GOOD, 0
        self.asked: list[str] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                self.send_response(registry.status)
                self.send_header("Content-Length", str(registry.promised or len(registry.body)))
                self.end_headers()
                self.wfile.write(registry.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def registry() -> Iterator[Registry]:
    opened = Registry()
    yield opened
    opened.server.shutdown()
    opened.server.server_close()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(GOOD).digest()).decode()
    files = {"tool.js": "lib/tool.js"}
    path = tmp_path / "packages.json"
    path.write_text(json.dumps({"@scope/tool": {"version": "1.2.3", "integrity": integrity, "files": files}}))
    return path


def kept(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*")) if cache.exists() else []


async def refused(packages: NpmPackages) -> MissingPackageError:
    with pytest.raises(MissingPackageError) as caught:
        await packages.read("tool.js")
    assert caught.value.code == "missing_package"
    assert caught.value.hint
    return caught.value


async def test_a_package_is_fetched_once_and_kept(registry: Registry, recipe: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    packages = NpmPackages(recipe, cache, registry.url)
    assert await packages.read("tool.js") == b"good()" * 1000
    assert await packages.read("package.json") is None, "the recipe names the files that are shown"
    assert registry.asked == [PATH]
    (file,) = kept(cache)
    assert file.stat().st_mode & 0o777 == 0o444
    assert await NpmPackages(recipe, cache, "http://127.0.0.1:1").read("tool.js") == b"good()" * 1000
    # What the cache has is believed as little as the registry.
    file.unlink()
    file.write_bytes(tarball(b"evil()"))
    assert await NpmPackages(recipe, cache, registry.url).read("tool.js") == b"good()" * 1000
    assert file.read_bytes() == GOOD


async def test_what_is_not_that_package_is_neither_shown_nor_kept(
    registry: Registry, recipe: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    packages = NpmPackages(recipe, cache, registry.url)
    registry.body = tarball(b"evil()")
    error = await refused(packages)
    assert "@scope/tool 1.2.3 is not that" in error.message
    assert "sha512" in error.hint
    assert kept(cache) == []
    registry.body = GOOD
    assert await packages.read("tool.js") == b"good()" * 1000, "it is asked again"


async def test_a_fetch_that_fails_leaves_nothing(registry: Registry, recipe: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    packages = NpmPackages(recipe, cache, f"http://somebody:password@{registry.host}")
    registry.status = 404
    error = await refused(packages)
    assert "@scope/tool: the registry answers 404" in error.message
    assert "npm config get registry" in error.hint
    assert "password" not in error.message + error.hint
    registry.status, registry.promised = 200, len(GOOD) + 100
    assert "@scope/tool" in (await refused(packages)).message, "the connection breaks off"
    assert kept(cache) == []
    registry.promised = 0
    assert await packages.read("tool.js") == b"good()" * 1000


async def test_no_more_is_read_than_a_package_may_have(
    registry: Registry, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npm_packages, "_MAX_BYTES", 1000)
    registry.body = bytes(50 * 1024 * 1024)
    await refused(NpmPackages(recipe, tmp_path / "cache", registry.url))
    assert kept(tmp_path / "cache") == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "no address", "file:///etc", "http://[", "http://x:y"])
async def test_a_registry_that_is_none(recipe: Path, tmp_path: Path, address: str) -> None:
    assert "@scope/tool" in (await refused(NpmPackages(recipe, tmp_path / "cache", address))).message
    assert kept(tmp_path / "cache") == []


async def test_npm_is_asked_where_nothing_says_it(
    registry: Registry, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    packages = NpmPackages(recipe, tmp_path / "cache", "")
    error = await refused(packages)
    assert "nothing says where npm packages come from" in error.message
    for way in ("npm_config_registry", ".npmrc", "install npm"):
        assert way in error.hint
    program = programs / "npm"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    assert "nothing says" in (await refused(packages)).message
    program.write_text(f'#!/bin/sh\n[ "$*" = "config get registry" ] && echo "{registry.url}/"\n')
    assert await packages.read("tool.js") == b"good()" * 1000
    assert registry.asked == [PATH]


def test_the_order_in_which_the_registry_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everybodys = tmp_path / "npmrc"
    monkeypatch.setattr(npm, "_GLOBAL_NPMRC", everybodys)
    assert find_npm_registry({}, tmp_path) == "", "npm is to be asked"
    everybodys.write_text("; registry=http://comment\n@scope:registry=http://scoped\nregistry = 'http://all/npm/'\n")
    assert find_npm_registry({}, tmp_path) == "http://all/npm"
    (tmp_path / ".npmrc").write_text("always-auth=true\n")
    assert find_npm_registry({}, tmp_path) == "http://all/npm", "its own file says nothing of it"
    (tmp_path / ".npmrc").write_bytes(b"\xff\xfe\nregistry=http://${HOST}/${ABSENT}/\n")
    assert find_npm_registry({"HOST": "own"}, tmp_path) == "http://own/${ABSENT}"
    assert find_npm_registry({"NPM_CONFIG_REGISTRY": "http://upper/"}, tmp_path) == "http://upper"
    variables = {"NPM_CONFIG_REGISTRY": "http://upper/", "npm_config_registry": "http://lower"}
    assert find_npm_registry(variables, tmp_path) == "http://lower"
    assert find_npm_registry({"npm_config_registry": ""}, tmp_path).startswith("http://"), "empty says nothing"
    (tmp_path / ".npmrc").unlink()
    (tmp_path / ".npmrc").mkdir()
    assert find_npm_registry({}, tmp_path) == "http://all/npm"
