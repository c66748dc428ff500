"""Which of a machine's package sources are taken for images."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.drivers.images.apt_sources import (
    PackageSource,
    find_debian_sources,
    parse_deb822,
    parse_one_line,
)
from atelier.model.errors import HostError

DEBIAN = """\
Types: deb deb-src
# a comment in the middle
URIs: http://mirror.example.org/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib non-free-firmware
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://mirror.example.org/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----
"""

THIRD_PARTY = """\
deb [arch=amd64 signed-by=/etc/apt/keyrings/docker.asc] https://download.docker.com/linux/debian bookworm stable
deb https://deb.nodesource.com/node_20.x nodistro main
# deb http://commented.example/debian bookworm main
deb-src http://mirror.example.org/debian bookworm main
"""


def _machine(folder: Path, **files: str) -> Path:
    (folder / "sources.list.d").mkdir()
    for name, text in files.items():
        (folder / "sources.list.d" / name.replace("_", ".")).write_text(text)
    return folder


def test_only_debians_own_suites_and_the_main_component_are_taken(tmp_path: Path) -> None:
    apt = _machine(tmp_path, debian_sources=DEBIAN, other_list=THIRD_PARTY)
    found = find_debian_sources(apt, "bookworm")
    assert [(source.uri, source.suite, source.components) for source in found] == [
        ("http://mirror.example.org/debian", "bookworm", ("main",)),
        ("http://mirror.example.org/debian", "bookworm-updates", ("main",)),
        ("http://mirror.example.org/debian-security", "bookworm-security", ("main",)),
    ]


def test_signed_by_is_kept_be_it_a_file_or_a_key(tmp_path: Path) -> None:
    found = find_debian_sources(_machine(tmp_path, debian_sources=DEBIAN), "bookworm")
    assert "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n" in found[0].render()
    key = parse_deb822(found[2].render())[0].options[0][1]
    assert key.splitlines()[1:] == [
        " -----BEGIN PGP PUBLIC KEY BLOCK-----",
        " .",
        " abc",
        " -----END PGP PUBLIC KEY BLOCK-----",
    ]


def test_the_one_line_form_is_read_with_its_options(tmp_path: Path) -> None:
    line = (
        "deb [ signed-by=/k/a.gpg,/k/b.gpg arch=amd64 trusted=yes ] http://mirror.example/debian bookworm main # why\n"
    )
    (tmp_path / "sources.list").write_text(line)
    assert find_debian_sources(tmp_path, "bookworm") == [
        PackageSource(
            "http://mirror.example/debian",
            "bookworm",
            ("main",),
            (("Signed-By", "/k/a.gpg /k/b.gpg"), ("Trusted", "yes")),
        )
    ]


def test_the_same_source_twice_is_taken_once(tmp_path: Path) -> None:
    line = "deb http://mirror.example/debian bookworm main\n"
    apt = _machine(tmp_path, a_list=line, b_list=line)
    assert len(find_debian_sources(apt, "bookworm")) == 1


def test_other_files_of_the_folder_are_no_sources(tmp_path: Path) -> None:
    apt = _machine(tmp_path)
    (apt / "sources.list.d" / "debian.list.disabled").write_text("deb http://mirror.example/debian bookworm main\n")
    with pytest.raises(HostError) as caught:
        find_debian_sources(apt, "bookworm")
    assert caught.value.code == "no_debian_sources"
    assert "bookworm" in caught.value.message
    assert "sources.list" in caught.value.hint


def test_updates_alone_do_not_make_an_image(tmp_path: Path) -> None:
    apt = _machine(tmp_path, a_list="deb http://mirror.example/debian bookworm-updates main\n")
    with pytest.raises(HostError):
        find_debian_sources(apt, "bookworm")


def test_half_lines_are_passed_over() -> None:
    assert parse_one_line("deb\ndeb http://x.example/\ndeb http://x.example/ bookworm\n") == []
    assert parse_deb822("Types: deb\n\n\n   \nnonsense\n") == []
