"""Image recipes, and what is told of a build's progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.drivers.images.recipe import get_recipe, list_recipe_names
from atelier.drivers.images.root_file_system import PhaseFollower
from atelier.model.errors import ImageBuildError, NotFoundError
from atelier.model.image import BuildProgress

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = 'suite = "bookworm"\nsize_mib = 64\npackages = ["git"]\ncustomize = "customize.sh"\n'


def _recipes(folder: Path, text: str = RECIPE) -> Path:
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "recipe.toml").write_text(text)
    (folder / "mine" / "customize.sh").write_text("true\n")
    for other in ("kernel", "tools"):
        (folder / other).mkdir(exist_ok=True)
        (folder / other / "recipe.toml").write_text("")
    return folder


def test_kernel_and_tools_are_no_images(tmp_path: Path) -> None:
    assert list_recipe_names(_recipes(tmp_path)) == ["mine"]


@pytest.mark.parametrize("name", ["absent", "kernel", "../mine", "mine/", "", ".", "x" * 300, "Mine"])
def test_a_name_without_a_recipe_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        get_recipe(_recipes(tmp_path), name)
    assert caught.value.code == "image_not_found"
    assert "mine" in caught.value.hint
    assert len(caught.value.message) < 100


def test_the_key_changes_with_everything_that_matters(tmp_path: Path) -> None:
    keys = {get_recipe(_recipes(tmp_path), "mine").key("amd64")}
    keys.add(get_recipe(tmp_path, "mine").key("arm64"))
    for changed in (RECIPE.replace("git", "curl"), RECIPE.replace("64", "128"), RECIPE.replace("bookworm", "trixie")):
        keys.add(get_recipe(_recipes(tmp_path, changed), "mine").key("amd64"))
    _recipes(tmp_path)
    (tmp_path / "mine" / "customize.sh").write_text("false\n")
    keys.add(get_recipe(tmp_path, "mine").key("amd64"))
    assert len(keys) == 6
    assert get_recipe(_recipes(tmp_path, RECIPE + "# a word more\n"), "mine").key("amd64") in keys


@pytest.mark.parametrize("text", ["suite = ", "size_mib = 1\n", 'suite = "a"\nsize_mib = "many"\n'])
def test_a_spoilt_recipe_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ImageBuildError, match=r"mine/recipe\.toml"):
        get_recipe(_recipes(tmp_path, text), "mine")


def test_the_base_recipe_is_what_sandboxes_expect() -> None:
    recipe = get_recipe(REPOSITORY / "images", "base")
    assert recipe.size_mib == 4096
    assert {"python3", "sudo", "git", "curl", "procps", "iproute2", "openssh-server"} <= set(recipe.packages)
    assert "systemd" not in " ".join(recipe.packages)


def test_progress_only_grows_and_ends_before_the_file_system_is_made() -> None:
    reports: list[BuildProgress] = []
    follow = PhaseFollower(reports.append)
    for line in (
        "I: running apt-get update...",
        "Get:1 http://mirror.example.org/debian bookworm InRelease [151 kB]",
        "I: downloading packages with apt...",
        "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
        "Get:1 http://mirror.example.org/debian bookworm/main amd64 libc6 amd64 2.36 [2759 kB]",
        "Get:2 http://mirror.example.org/debian bookworm/main amd64 bash amd64 5.2 [1491 kB]",
        "I: extracting archives...",
        "I: installing essential packages...",
        "I: installing remaining packages inside the chroot...",
        "0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.",
        "Unpacking git (1:2.39.5) ...",
        "Setting up git (1:2.39.5) ...",
        "Setting up something that was not announced ...",
        "I: running --customize-hook in shell: sh -c 'set -eu' exec /tmp/tree",
        "I: cleaning package lists and apt cache...",
        "I: creating tarball...",
    ):
        follow(line)
    fractions = [report.fraction for report in reports if report.fraction is not None]
    assert len(fractions) == len(reports)
    assert fractions == sorted(fractions)
    assert fractions[-1] < 0.9
    assert [report.phase for report in reports][:2] == ["download", "download"]
    assert {"download", "unpack", "install", "pack"} == {report.phase for report in reports}


def test_progress_is_told_by_whole_per_cents() -> None:
    reports: list[BuildProgress] = []
    follow = PhaseFollower(reports.append)
    follow("I: installing remaining packages inside the chroot...")
    follow("0 upgraded, 1000 newly installed, 0 to remove and 0 not upgraded.")
    for number in range(1000):
        follow(f"Unpacking package{number} ...")
    assert len(reports) < 40
