"""One suite for the fake image driver and the real one. The real one builds a tiny image of its own, once, in a cache
that all of this module's tests share; kernel, tools image and package lists come from the machine's cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.real_machines import REPOSITORY, images_of_this_checkout, missing_programs

from atelier.config.settings import load_settings
from atelier.drivers.images.debian import DebianImages
from atelier.drivers.images.fake import FakeImages
from atelier.drivers.images.interface import ImageDriver
from atelier.model.errors import AtelierError, ImageBuildError, NotFoundError
from atelier.model.image import BuildProgress

MISSING = missing_programs("mmdebstrap", "mke2fs", "debugfs", "apt-get", "unshare")
NAME = "tiny"
RECIPE = """\
suite = "bookworm"
size_mib = 512
packages = []
excluded_paths = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*"]
customize = "customize.sh"
"""
CUSTOMIZE = """\
set -eu
printf 'of user 1000\\n' >"$1/srv/mine"
chown 1000:1000 "$1/srv/mine"
mkdir -p "$1/opt/shared"
"""


@dataclass
class Subject:
    """Two drivers over one cache, as two managers have them, and a folder whose images are theirs."""

    images: ImageDriver
    another: ImageDriver
    boot: ImageDriver


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    recipes = folder / "recipes"
    shutil.copytree(REPOSITORY / "images", recipes, ignore=shutil.ignore_patterns("base"))
    (recipes / NAME).mkdir()
    (recipes / NAME / "recipe.toml").write_text(RECIPE)
    (recipes / NAME / "customize.sh").write_text(CUSTOMIZE)
    _share_package_lists(folder / "cache")
    return folder


def _share_package_lists(cache: Path) -> None:
    """Those that the machine's cache has, or will have: they are fetched once."""
    lists = load_settings().cache_dir / "packages"
    lists.mkdir(parents=True, exist_ok=True)
    cache.mkdir()
    (cache / "packages").symlink_to(lists)


@pytest.fixture(
    scope="module", params=["fake", pytest.param("real", marks=pytest.mark.skipif(bool(MISSING), reason=MISSING))]
)
def subject(request: pytest.FixtureRequest, tiny_cache: Path) -> Iterator[Subject]:
    if request.param == "fake":
        fake = FakeImages(recipes=(NAME,))
        yield Subject(fake, fake, fake)
    else:
        drivers = [
            DebianImages(tiny_cache / "cache", tiny_cache / "recipes", REPOSITORY / "src" / "atelier") for _ in range(2)
        ]
        yield Subject(drivers[0], drivers[1], images_of_this_checkout())


@pytest.fixture(scope="module", autouse=True)
def package_lists() -> list[str]:
    """The machine's own, before the first build."""
    return _package_lists()


def _package_lists() -> list[str]:
    folder = Path("/var/lib/apt/lists")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _ignore(_: BuildProgress) -> None:
    pass


async def test_nothing_is_found_before_it_is_built(subject: Subject) -> None:
    assert await subject.images.list_recipes() == [NAME]
    assert await subject.images.find_image(NAME) is None
    assert await subject.images.list_images() == []


@pytest.mark.parametrize("name", ["absent", "../tiny", "", "x" * 300])
async def test_an_unknown_name_is_not_found(subject: Subject, name: str) -> None:
    for operation in (subject.images.find_image(name), subject.images.ensure_image(name, _ignore)):
        with pytest.raises(NotFoundError) as caught:
            await operation
        assert caught.value.code == "image_not_found"
        assert NAME in caught.value.hint


async def test_asked_for_twice_at_once_an_image_is_built_once(subject: Subject) -> None:
    reports: list[BuildProgress] = []
    first, second = await asyncio.gather(
        subject.images.ensure_image(NAME, reports.append), subject.another.ensure_image(NAME, _ignore)
    )
    assert first == second
    assert re.fullmatch(rf"{NAME}-[0-9a-f]{{16}}", first.id)
    assert first.name == NAME
    assert first.path.is_file()
    assert await subject.images.list_images() == [first]
    assert await subject.another.find_image(NAME) == first
    assert reports, "the build said nothing"
    assert all(report.fraction is None or 0.0 <= report.fraction <= 1.0 for report in reports)


async def test_a_built_image_is_not_built_again(subject: Subject) -> None:
    reports: list[BuildProgress] = []
    found = await subject.images.find_image(NAME)
    assert await subject.images.ensure_image(NAME, reports.append) == found
    assert reports == []


async def test_a_refresh_supersedes_the_image_and_keeps_the_old_file(subject: Subject) -> None:
    old = await subject.images.ensure_image(NAME, _ignore)
    new = await subject.images.ensure_image(NAME, _ignore, refresh=True)
    assert new.id != old.id
    assert new.built_at > old.built_at
    assert await subject.another.find_image(NAME) == new
    assert await subject.another.ensure_image(NAME, _ignore) == new
    assert old.path.is_file()
    assert [image.id for image in await subject.images.list_images()] == [old.id, new.id]


async def test_boot_files_are_there_once_ensured_and_stay_the_same(subject: Subject) -> None:
    ensured = await subject.boot.ensure_boot_files(_ignore)
    assert ensured.kernel.is_file() and ensured.initramfs.is_file() and ensured.tools.is_file()
    assert ensured.kernel_release and ensured.tools_id
    assert await subject.boot.find_boot_files() == ensured
    assert await subject.boot.ensure_boot_files(_ignore) == ensured


# --- the real one alone ---------------------------------------------------------------------------------------------

real_only = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def _debugfs(image: Path, request: str) -> str:
    ran = subprocess.run(["debugfs", "-R", request, str(image)], capture_output=True, text=True, check=True)
    return ran.stdout


@pytest.mark.parametrize("subject", ["real"], indirect=True)
@real_only
async def test_a_built_image_is_a_sparse_read_only_file_with_the_right_owners(subject: Subject) -> None:
    image = await subject.images.ensure_image(NAME, _ignore)
    found = image.path.stat()
    assert found.st_size == image.size_mib * 1024 * 1024
    assert image.stored_bytes < found.st_size
    assert stat.S_IMODE(found.st_mode) == 0o444
    assert re.search(r"User: +1000 +Group: +1000", _debugfs(image.path, "stat /srv/mine"))
    for path in ("/", "/etc/passwd", "/usr/bin/dpkg"):
        assert re.search(r"User: +0 +Group: +0", _debugfs(image.path, f"stat {path}")), path
    assert re.search(r"Group: +42 ", _debugfs(image.path, "stat /etc/shadow"))
    assert "has_journal" in subprocess.run(["dumpe2fs", "-h", image.path], capture_output=True, text=True).stdout
    assert subprocess.run(["e2fsck", "-fn", image.path], capture_output=True).returncode == 0


@pytest.mark.parametrize("subject", ["real"], indirect=True)
@real_only
async def test_the_builds_left_nothing_behind_and_the_machines_package_lists_alone(
    subject: Subject, tiny_cache: Path, package_lists: list[str]
) -> None:
    await subject.images.ensure_image(NAME, _ignore)
    assert _package_lists() == package_lists
    assert [path for path in (tiny_cache / "cache" / "images").rglob("*") if ".building-" in path.name] == []


@pytest.mark.parametrize("subject", ["real"], indirect=True)
@real_only
async def test_a_cancelled_build_leaves_nothing_and_does_not_block_the_next(subject: Subject, tiny_cache: Path) -> None:
    images = tiny_cache / "cache" / "images"
    before = {image.id for image in await subject.images.list_images()}
    began = asyncio.Event()

    def report(progress: BuildProgress) -> None:
        if progress.phase == "unpack":
            began.set()

    build = asyncio.create_task(subject.images.ensure_image(NAME, report, refresh=True))
    await asyncio.wait_for(began.wait(), 120)
    build.cancel()
    with pytest.raises(asyncio.CancelledError):
        await build
    assert {image.id for image in await subject.images.list_images()} == before
    assert [path for path in images.rglob("*") if ".building-" in path.name] == []
    assert str(images) not in Path("/proc/self/mountinfo").read_text()
    await asyncio.wait_for(subject.another.ensure_image(NAME, _ignore), 10)


@real_only
async def test_a_package_that_does_not_exist_is_named_before_anything_is_built(
    tmp_path: Path, tiny_cache: Path
) -> None:
    recipes = tmp_path / "recipes"
    (recipes / "broken").mkdir(parents=True)
    (recipes / "broken" / "recipe.toml").write_text(
        'suite = "bookworm"\nsize_mib = 64\npackages = ["git", "no-such-package-anywhere"]\n'
    )
    _share_package_lists(tmp_path / "cache")
    images = DebianImages(tmp_path / "cache", recipes, REPOSITORY / "src" / "atelier")
    with pytest.raises(ImageBuildError, match="no-such-package-anywhere"):
        await images.ensure_image("broken", _ignore)
    assert await images.list_images() == []


@real_only
async def test_a_change_of_the_agent_gives_another_tools_image_and_keeps_the_old_one(tmp_path: Path) -> None:
    sources = tmp_path / "atelier"
    for package in ("guest_agent", "guest_protocol"):
        shutil.copytree(REPOSITORY / "src" / "atelier" / package, sources / package)
    # The machine's cache has the unpacked Python and the kernel: hard links spare the test a download.
    cache = tmp_path / "cache"
    own = images_of_this_checkout()
    first = await own.ensure_boot_files(_ignore)
    for part in ("kernel", "tools"):
        folder = first.kernel.parent if part == "kernel" else first.tools.parent
        shutil.copytree(folder, cache / part, copy_function=_link_or_copy, symlinks=True)
    images = DebianImages(cache, REPOSITORY / "images", sources)
    assert (await images.ensure_boot_files(_ignore)).tools_id == first.tools_id
    (sources / "guest_agent" / "of_the_test.py").write_text("ANSWER = 42\n")
    assert await images.find_boot_files() is None
    second = await images.ensure_boot_files(_ignore)
    assert second.tools_id != first.tools_id
    assert second.kernel.name == first.kernel.name
    assert (cache / "tools" / first.tools.name).is_file()
    listing = _debugfs(second.tools, "ls -p /agent/atelier/guest_agent")
    assert "of_the_test.pyc" in listing
    assert ".py/" not in listing


@real_only
async def test_the_tools_image_has_no_journal_and_belongs_to_root(tmp_path: Path) -> None:
    boot = await images_of_this_checkout().ensure_boot_files(_ignore)
    assert stat.S_IMODE(boot.tools.stat().st_mode) == 0o444
    assert subprocess.run(["e2fsck", "-fn", boot.tools], capture_output=True).returncode == 0
    header = subprocess.run(["dumpe2fs", "-h", boot.tools], capture_output=True, text=True).stdout
    assert "has_journal" not in header
    for path in ("/bin/atelier-init", "/bin/atelier-agent", "/bin/busybox", "/python/bin/python3.11"):
        assert re.search(r"User: +0 +Group: +0", _debugfs(boot.tools, f"stat {path}")), path
    assert json.dumps(boot.tools_id)[1:-1] in boot.tools.name


async def test_a_machine_without_debians_sources_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = DebianImages(tmp_path / "cache", REPOSITORY / "images", REPOSITORY / "src" / "atelier")
    (tmp_path / "apt").mkdir()
    monkeypatch.setattr("atelier.drivers.images.debian.APT_DIRECTORY", tmp_path / "apt")
    with pytest.raises(AtelierError) as caught:
        await images.ensure_image("base", _ignore)
    assert caught.value.code == "no_debian_sources"
    assert caught.value.hint


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
