"""The tools image: what a sandbox brings along besides its own image, and PID 1's and the guest agent's home.

Called by ``debian.DebianImages``. The own Python is unpacked, pruned and compiled once; a change of the guest agent
repeats only the packing. The image is named by the hash of the tree in it (two ext4 images of one tree differ).
"""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import os
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from atelier.drivers.images.apt import DebianArchive
from atelier.drivers.images.cache import (
    KEY_DIGITS,
    as_build_error,
    hash_file,
    hash_tree,
    key_of,
    publish,
    read_manifest,
    remove_left_over_work,
    work_folder,
    write_manifest,
)
from atelier.drivers.images.ext4 import FIXED_TIME_SECONDS, READ_ONLY_TOOLS, make_ext4, user_namespace
from atelier.host import command
from atelier.host.file_lock import hold_lock
from atelier.model.errors import CommandError, ImageBuildError
from atelier.model.image import BuildProgress, ProgressReporter

_FORMAT = 1
_VARIANT = "core"
_GUEST_ROOT = "/opt/shared"
_PYTHON = "python/bin/python3.11"
_LIBRARY = "python/lib/python3.11"
_COMPILE_SECONDS = 300.0
_SCRIPTS = {"atelier-init": "bin/atelier-init", "atelier-agent": "bin/atelier-agent", "mounts": "etc/mounts"}
_AGENT_PACKAGES = ("guest_agent", "guest_protocol")
_START = "start.py"
_BUNDLER = "bundle.py"
_COMPILER = "compile.py"


@dataclass(frozen=True, slots=True)
class ToolsImage:
    """``id`` is the first digits of the tree's hash."""

    path: Path
    id: str


@dataclass(frozen=True, slots=True)
class _ToolsRecipe:
    packages: tuple[str, ...]
    loader: str
    libraries: tuple[str, ...]
    python_program: str
    standard_library: str
    left_out: tuple[str, ...]
    checked_imports: tuple[str, ...]


class ToolsBuilder:
    """``directory`` is this builder's own part of the cache, ``recipe_directory`` the tools recipe and its scripts,
    ``agent_source`` the folder of the package ``atelier`` (it holds guest_agent and guest_protocol)."""

    def __init__(
        self, directory: Path, recipe_directory: Path, agent_source: Path, archive: DebianArchive, source_key: str
    ) -> None:
        self._directory = directory
        self._recipe_directory = recipe_directory
        self._agent_source = agent_source
        self._archive = archive
        self._source_key = source_key

    def find(self) -> ToolsImage | None:
        """The tools image of the recipe and the agent's sources as they stand, if it is built."""
        manifest = read_manifest(self._manifest())
        if manifest is None:
            return None
        path = self._directory / str(manifest["image"])
        return ToolsImage(path, str(manifest["id"])) if path.exists() else None

    async def ensure(self, report: ProgressReporter) -> ToolsImage:
        """Build what is missing. Raises ImageBuildError, HostError, MissingProgramError, DiskFullError."""
        if found := await asyncio.to_thread(self.find):
            return found

        def waiting() -> None:
            report(BuildProgress("wait", "another process is building the tools image"))

        async with hold_lock(self._directory / "lock", on_wait=waiting):
            if found := self.find():
                return found
            remove_left_over_work(self._directory)
            recipe = self._read_recipe()
            python = self._python_tree(recipe)
            if not python.is_dir():
                await self._build_python(recipe, python, report)
            report(BuildProgress("tools", "packing the guest agent"))
            # Taken before the sources are read: a change in between makes the next build differ, not this one lie.
            manifest = self._manifest()
            with work_folder(self._directory, "packing the tools image") as work:
                return await self._pack(recipe, python, work, manifest)

    async def _build_python(self, recipe: _ToolsRecipe, destination: Path, report: ProgressReporter) -> None:
        await self._archive.update(report)
        with work_folder(self._directory, "unpacking the guest agent's Python") as work:
            packages = await self._archive.download(recipe.packages, work / "packages", report)
            report(BuildProgress("unpack", "unpacking the guest agent's Python"))
            unpacked = work / "unpacked"
            await self._archive.unpack(packages, unpacked)
            tree = work / "tree"
            await asyncio.to_thread(_collect_programs, recipe, unpacked, tree)
            await asyncio.to_thread(_prune, unpacked / recipe.standard_library, recipe.left_out)
            report(BuildProgress("compile", "compiling the standard library"))
            # The interpreter that compiles runs on sources, the finished one on what was compiled.
            with_sources = work / "with-sources"
            (with_sources / _LIBRARY).parent.mkdir(parents=True)
            (unpacked / recipe.standard_library).rename(with_sources / _LIBRARY)
            await asyncio.to_thread(shutil.copytree, tree / "lib", with_sources / "lib")
            (with_sources / _PYTHON).parent.mkdir()
            shutil.copy2(tree / _PYTHON, with_sources / _PYTHON)
            await self._compile(recipe, with_sources, with_sources / _LIBRARY, tree / _LIBRARY, _LIBRARY)
            shutil.copytree(with_sources / _LIBRARY / "lib-dynload", tree / _LIBRARY / "lib-dynload")
            await self._run_python(recipe, tree, "-c", f"import {', '.join(recipe.checked_imports)}")
            publish(tree, destination)

    async def _pack(self, recipe: _ToolsRecipe, python: Path, work: Path, manifest: Path) -> ToolsImage:
        tree = work / "tree"
        await asyncio.to_thread(shutil.copytree, python, tree, symlinks=True)
        for name, place in _SCRIPTS.items():
            target = tree / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self._recipe_directory / name).read_bytes())
            target.chmod(0o755 if place.startswith("bin/") else 0o644)
        sources = work / "agent"
        for package in _AGENT_PACKAGES:
            shutil.copytree(
                self._agent_source / package,
                sources / "atelier" / package,
                ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
            )
        # The guest's copy of the package exports nothing: the agent imports its two rooms by name.
        (sources / "atelier" / "__init__.py").write_text("")
        (sources / "start.py").write_bytes((self._recipe_directory / _START).read_bytes())
        await self._compile(recipe, tree, sources, tree / "agent", "agent")
        await self._run_python(recipe, tree, str(self._recipe_directory / _BUNDLER), str(tree))
        content_hash = await asyncio.to_thread(_settle_tree, tree)
        identity = content_hash[:KEY_DIGITS]
        image = work / "image"
        await make_ext4(
            tree,
            image,
            _image_mib(tree),
            READ_ONLY_TOOLS,
            identity=f"{_VARIANT}-{identity}",
            namespace=user_namespace(whole_range=False),
        )
        final = self._directory / f"{_VARIANT}-{identity}.ext4"
        await asyncio.to_thread(publish, image, final)
        write_manifest(manifest, {"id": identity, "image": final.name, "tree_sha256": content_hash})
        return ToolsImage(final, identity)

    async def _compile(
        self, recipe: _ToolsRecipe, tree: Path, source: Path, destination: Path, guest_path: str
    ) -> None:
        compiler = self._recipe_directory / _COMPILER
        await self._run_python(
            recipe, tree, str(compiler), str(source), str(destination), f"{_GUEST_ROOT}/{guest_path}"
        )

    async def _run_python(self, recipe: _ToolsRecipe, tree: Path, *arguments: str) -> None:
        """The guest's interpreter on this machine: bytecode must be of its version, whatever runs the manager."""
        loader = [str(tree / "lib" / recipe.loader), "--inhibit-cache", "--library-path", str(tree / "lib")]
        try:
            await command.run(
                [*loader, str(tree / _PYTHON), "-I", "-S", "-B", "-X", "utf8", *arguments],
                timeout_seconds=_COMPILE_SECONDS,
            )
        except CommandError as error:
            raise as_build_error("preparing the guest agent's Python", error) from error

    def _manifest(self) -> Path:
        parts = [hash_tree(self._agent_source / package, pattern="*.py") for package in _AGENT_PACKAGES]
        parts += [hash_file(self._recipe_directory / name) for name in (*sorted(_SCRIPTS), _START, _BUNDLER)]
        recipe = self._read_recipe()
        key = key_of(_FORMAT, parts, self._python_tree(recipe).name)
        return self._directory / f"{_VARIANT}-{key}.json"

    def _python_tree(self, recipe: _ToolsRecipe) -> Path:
        compiler = hashlib.sha256((self._recipe_directory / _COMPILER).read_bytes()).hexdigest()
        fields = [
            recipe.packages,
            recipe.loader,
            recipe.libraries,
            recipe.python_program,
            recipe.standard_library,
            recipe.left_out,
            recipe.checked_imports,
        ]
        return self._directory / f"python-{key_of(_FORMAT, self._source_key, fields, compiler)}"

    def _read_recipe(self) -> _ToolsRecipe:
        file = self._recipe_directory / "recipe.toml"
        try:
            fields = tomllib.loads(file.read_text())

            def words(name: str) -> tuple[str, ...]:
                return tuple(str(word) for word in cast(list[object], fields[name]))

            return _ToolsRecipe(
                packages=words("packages"),
                loader=str(fields["loader"]),
                libraries=words("libraries"),
                python_program=str(fields["python_program"]),
                standard_library=str(fields["standard_library"]),
                left_out=words("left_out"),
                checked_imports=words("checked_imports"),
            )
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ImageBuildError(f"the tools recipe {file} cannot be read: {error!r}") from error


def _collect_programs(recipe: _ToolsRecipe, unpacked: Path, tree: Path) -> None:
    """Busybox, loader, libraries and interpreter at their places in the tools tree."""
    # Debian 12 still has /lib and /bin of their own inside some packages.
    folders = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "bin", "usr/bin")
    wanted = {f"lib/{name}": name for name in (recipe.loader, *recipe.libraries)}
    wanted |= {"bin/busybox": "busybox", _PYTHON: Path(recipe.python_program).name}
    for place, name in wanted.items():
        present = [unpacked / folder / name for folder in folders if (unpacked / folder / name).is_file()]
        if not present:
            raise ImageBuildError(f"Debian's packages for the tools image hold no {name}")
        target = tree / place
        target.parent.mkdir(parents=True, exist_ok=True)
        # Follows links: the name under which a library is asked for is one.
        shutil.copyfile(present[0], target)
        target.chmod(0o755)


def _prune(library: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted(library.rglob("*")):
        relative = str(path.relative_to(library))
        if any(fnmatch.fnmatch(relative, pattern) for pattern in patterns) and path.exists():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _settle_tree(tree: Path) -> str:
    """Give every file the same time, whatever the build machine's clock said, and return the tree's hash."""
    for path in [tree, *tree.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
        os.utime(path, (FIXED_TIME_SECONDS, FIXED_TIME_SECONDS), follow_symlinks=False)
    return hash_tree(tree)


def _image_mib(tree: Path) -> int:
    """Room for the tree in 4 KiB blocks, with what inodes and folders take."""
    blocks = sum((path.lstat().st_size + 4095) // 4096 + 1 for path in tree.rglob("*"))
    return blocks * 4096 // (1024 * 1024) * 11 // 10 + 4
