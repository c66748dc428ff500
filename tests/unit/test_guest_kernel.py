"""Which guest kernel is taken: one of our own wherever it is built, else Debian's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.real_machines import REPOSITORY

from atelier.drivers.images.apt import DebianArchive
from atelier.drivers.images.kernel import KernelBuilder
from atelier.model.errors import ImageBuildError
from atelier.model.image import BuildProgress


def builder(folder: Path, *, from_source: bool = False) -> KernelBuilder:
    recipes = folder / "recipes"
    if not recipes.exists():
        shutil.copytree(REPOSITORY / "images" / "kernel", recipes)
    archive = DebianArchive(folder / "apt", "bookworm", "amd64", apt_directory=folder / "no-apt")
    return KernelBuilder(folder / "cache", recipes, archive, "bookworm", "amd64", from_source=from_source)


def put(folder: Path, release: str, *, own: bool) -> None:
    """As a build leaves it, from a kernel that is none."""
    made = builder(folder)
    recipe = made._read_recipe()
    manifest = made._manifest_of_own(recipe.source) if own else made._manifest_of_debians(recipe)
    work = folder / f"work-{release}"
    (work / "tree/bin").mkdir(parents=True)
    (work / "tree/bin/busybox").write_bytes(b"busybox")
    (work / "kernel").write_bytes(release.encode())
    (folder / "cache").mkdir(exist_ok=True)
    made._publish(work / "kernel", release, [], work, manifest)


def say_nothing(_: BuildProgress) -> None: ...


async def test_one_of_our_own_is_taken_wherever_it_is_built(tmp_path: Path) -> None:
    put(tmp_path, "6.1.0-debian", own=False)
    assert (await builder(tmp_path).ensure(say_nothing)).release == "6.1.0-debian"
    put(tmp_path, "6.1.1-atelier", own=True)
    found = await builder(tmp_path).ensure(say_nothing)
    assert found.release == "6.1.1-atelier"
    assert found.kernel.read_bytes() == b"6.1.1-atelier"
    assert b"busybox" in found.initramfs.read_bytes() and b"modules/00" not in found.initramfs.read_bytes()
    assert await builder(tmp_path, from_source=True).ensure(say_nothing) == found


async def test_who_asks_for_our_own_does_not_get_debians(tmp_path: Path) -> None:
    put(tmp_path, "6.1.0-debian", own=False)
    await builder(tmp_path).ensure(say_nothing)
    assert builder(tmp_path, from_source=True).find() is None


@pytest.mark.parametrize("file", ["fragment", "build.sh"])
async def test_a_change_of_what_it_is_built_from_makes_it_another(tmp_path: Path, file: str) -> None:
    put(tmp_path, "6.1.1-atelier", own=True)
    assert (await builder(tmp_path).ensure(say_nothing)).release == "6.1.1-atelier"
    with (tmp_path / "recipes/from_source" / file).open("a") as changed:
        changed.write("\n# another\n")
    assert builder(tmp_path).find() is None


async def test_a_recipe_without_its_source_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes/recipe.toml"
    builder(tmp_path)
    recipe.write_text(recipe.read_text().partition("[from_source]")[0])
    with pytest.raises(ImageBuildError, match="from_source"):
        builder(tmp_path).find()
