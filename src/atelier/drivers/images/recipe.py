"""Recipes of root file system images: ``<recipes>/<name>/recipe.toml``.

Called by ``debian.DebianImages`` and the builder. A recipe is what a build depends on and nothing else: its ``key``
stands in the image's id.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from atelier.drivers.images.cache import key_of
from atelier.model.errors import ImageBuildError, NotFoundError

RECIPE_FILE = "recipe.toml"
# Folders that hold what every sandbox needs besides its image.
_NOT_IMAGES = frozenset({"kernel", "tools"})
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class ImageRecipe:
    """``customize`` is the text of a shell script that gets the tree as its first argument; may be empty."""

    name: str
    suite: str
    size_mib: int
    packages: tuple[str, ...]
    excluded_paths: tuple[str, ...]
    customize: str

    def key(self, *further: object) -> str:
        return key_of(
            self.name, self.suite, self.size_mib, self.packages, self.excluded_paths, self.customize, *further
        )


def list_recipe_names(recipes_dir: Path) -> list[str]:
    return sorted(
        path.parent.name
        for path in recipes_dir.glob(f"*/{RECIPE_FILE}")
        if path.parent.name not in _NOT_IMAGES and _NAME.fullmatch(path.parent.name)
    )


def get_recipe(recipes_dir: Path, name: str) -> ImageRecipe:
    """Raises NotFoundError (``image_not_found``) for a name without a recipe, ImageBuildError for a spoilt one."""
    names = list_recipe_names(recipes_dir)
    if name not in names:
        raise NotFoundError(
            f"there is no image {name[:60]!r}", code="image_not_found", hint=f"images known here: {', '.join(names)}"
        )
    file = recipes_dir / name / RECIPE_FILE
    try:
        fields = tomllib.loads(file.read_text())

        def words(field: str) -> tuple[str, ...]:
            return tuple(str(word) for word in cast(list[object], fields.get(field, [])))

        script = str(fields.get("customize", ""))
        return ImageRecipe(
            name=name,
            suite=str(fields["suite"]),
            size_mib=int(fields["size_mib"]),
            packages=words("packages"),
            excluded_paths=words("excluded_paths"),
            customize=(recipes_dir / name / script).read_text() if script else "",
        )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ImageBuildError(f"the image recipe {file} cannot be read: {error!r}") from error
