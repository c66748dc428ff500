"""A hostile guest's archive: what is refused, what is left out, and that nothing is ever written outside the target."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import tarfile
from pathlib import Path

import pytest

from atelier.client.folder_writer import FolderWriter, UnpackLimits, UnpackReport
from atelier.client.tar_reader import TarReader
from atelier.model.errors import AtelierError, ConflictError, GuestProtocolError


class Archive:
    """Writes archives that no honest program would."""

    def __init__(self, form: int = tarfile.GNU_FORMAT) -> None:
        self.data = b""
        self._form = form

    def add(
        self, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **fields: object
    ) -> Archive:
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.size = kind, mode, len(content)
        for field, value in fields.items():
            setattr(member, field, value)
        self.data += member.tobuf(self._form, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)
        return self

    def link(self, name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Archive:
        return self.add(name, kind=kind, linkname=target)

    def folder(self, name: str, mode: int = 0o755) -> Archive:
        return self.add(name, kind=tarfile.DIRTYPE, mode=mode)

    def end(self) -> bytes:
        return self.data + bytes(1024)


def unpack(data: bytes, target: Path, limits: UnpackLimits | None = None, piece: int = 65536) -> UnpackReport:
    target.mkdir(exist_ok=True)
    with FolderWriter(target, limits) as writer:
        for start in range(0, len(data), piece):
            writer.feed(data[start : start + piece])
        return writer.finish()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The folder to unpack into; beside it lies what must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    return tmp_path / "target"


@pytest.fixture(autouse=True)
def nothing_outside_changes(tmp_path: Path):
    yield
    outside = tmp_path / "outside"
    if outside.exists():
        assert sorted(os.listdir(tmp_path)) in (["outside"], ["outside", "target"])
        assert os.listdir(outside) == ["precious"]
        assert (outside / "precious").read_text() == "precious"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("piece", [1, 511, 100_000])
def test_an_honest_archive_arrives_whole(target: Path, form: int, piece: int) -> None:
    deep = "/".join(["folder"] * 12) + "/file"
    data = (
        Archive(form).folder("./").folder("./a").add("./a/x", b"hello" * 1000, mtime=1_600_000_000).add(deep, b"deep")
        .add("a/run", b"#!", mode=0o755).add("empty").link("a/l", "x").link("b", "a/x").link("h", "a/x", tarfile.LNKTYPE).end()
    )  # fmt: skip
    report = unpack(data, target, piece=piece)
    assert (target / "a/x").read_bytes() == b"hello" * 1000
    assert (target / "a/x").stat().st_mtime == 1_600_000_000
    assert (target / deep).read_bytes() == b"deep"
    assert stat.S_IMODE((target / "a/run").stat().st_mode) & 0o100
    assert (target / "empty").read_bytes() == b""
    assert os.readlink(target / "a/l") == "x"
    assert (target / "b").read_bytes() == b"hello" * 1000
    assert (target / "h").samefile(target / "a/x")
    assert (report.file_count, report.link_count, report.skipped_count) == (4, 3, 0)
    assert report.content_bytes == 5000 + 4 + 2


@pytest.mark.parametrize("name", [b"\xff\xfe", "ä\n\x1b[31m".encode(), b"a" * 255, b"x" * 200 + b"/" + b"y" * 200])
def test_any_honest_name_is_kept(target: Path, name: bytes) -> None:
    unpack(Archive().add(os.fsdecode(name), b"1").end(), target)
    assert Path(os.fsdecode(bytes(target) + b"/" + name)).read_bytes() == b"1"


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../outside/precious",
        "a/../../outside/precious",
        "..",
        "a/..",
        "../target/x",
        "x/" + "y" * 256,
        ".",
        "./",
    ],
)
def test_names_that_leave_the_target_end_the_copy(target: Path, name: str) -> None:
    with pytest.raises(GuestProtocolError) as caught:
        unpack(Archive().add("before", b"1").add(name, b"evil").end(), target)
    assert caught.value.code == "unsafe_archive"
    assert sorted(os.listdir(target)) == ["before"]


def test_names_in_extension_headers_are_judged_too(target: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with pytest.raises(GuestProtocolError):
            unpack(Archive(form).add("../" + "outside/" + "x" * 150, b"evil").end(), target)
    with pytest.raises(GuestProtocolError):
        unpack(Archive(tarfile.PAX_FORMAT).add("ok", b"evil", pax_headers={"path": "../outside/evil"}).end(), target)
    with pytest.raises(GuestProtocolError):
        unpack(Archive(tarfile.PAX_FORMAT).add("ok", b"evil", pax_headers={"path": "a\0b"}).end(), target)


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("l", "/etc/passwd"),
        ("l", ".."),
        ("l", "../outside"),
        ("a/l", "../../outside"),
        ("a/l", "x/../../../outside"),
        ("l", "a/.."),
        ("l", "/"),
        ("l", "./../outside"),
    ],
)
def test_links_that_lead_outside_are_left_out_and_named(target: Path, name: str, link: str) -> None:
    report = unpack(Archive().folder("a").link(name, link).add("after", b"1").end(), target)
    assert not os.path.lexists(target / name)
    assert report.skipped_count == 1
    assert report.skipped[0][0] == name.encode()
    assert (target / "after").exists()


def test_links_that_stay_inside_are_kept_as_they_are(target: Path) -> None:
    data = (
        Archive().folder("a").folder("a/b").link("a/b/up", "../..").link("a/b/x", "../../file").link("dangling", "later")
        .link("later", "a/b").link("here", ".").add("file", b"1").end()
    )  # fmt: skip
    report = unpack(data, target)
    assert report.skipped == []
    assert os.readlink(target / "a/b/up") == "../.."
    assert (target / "a/b/x").read_bytes() == b"1"
    assert (target / "here").resolve() == target.resolve()


def test_nothing_is_written_through_a_link_of_the_archive(target: Path) -> None:
    with pytest.raises(ConflictError):
        unpack(Archive().folder("real").link("l", "real").add("l/evil", b"x").end(), target)
    assert os.listdir(target / "real") == []


def test_chains_of_links_cannot_climb_out(target: Path) -> None:
    """Each link alone looks harmless; together they would reach the parent."""
    data = (
        Archive().folder("a").folder("a/b").folder("a/b/c").link("top", "a/b/c").link("a/b/c/back", "../../..")
        .link("out", "a/b/c/back/..").link("out2", "top/../../../..").link("out3", "a/b/c/back/x").end()
    )  # fmt: skip
    report = unpack(data, target)
    assert {name for name, _ in report.skipped} == {b"out", b"out2", b"out3"}
    for name in os.listdir(target):
        resolved = (target / name).resolve()
        assert resolved == target.resolve() or target.resolve() in resolved.parents


def test_a_file_takes_the_place_of_a_link_and_does_not_follow_it(target: Path) -> None:
    target.mkdir()
    (target / "f").symlink_to("../outside/precious")
    unpack(Archive().add("f", b"new").end(), target)
    assert not (target / "f").is_symlink()
    assert (target / "f").read_bytes() == b"new"


def test_existing_links_in_the_target_are_not_followed(target: Path) -> None:
    target.mkdir()
    (target / "sub").symlink_to("../outside")
    for archive in (Archive().add("sub/evil", b"x"), Archive().folder("sub"), Archive().folder("sub/evil")):
        with pytest.raises(ConflictError) as caught:
            unpack(archive.end(), target)
        assert caught.value.code == "target_in_the_way"
    report = unpack(Archive().link("l", "sub/precious").end(), target)
    assert report.skipped_count == 1


def test_a_target_that_is_itself_a_link_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "named").symlink_to("real")
    unpack(Archive().add("f", b"1").end(), tmp_path / "named")
    assert (tmp_path / "real/f").read_bytes() == b"1"


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"V", b"S"])
def test_devices_fifos_and_unknown_kinds_are_left_out(target: Path, kind: bytes) -> None:
    report = unpack(Archive().add("d", kind=kind, devmajor=1, devminor=3).add("after", b"1").end(), target)
    assert os.listdir(target) == ["after"]
    assert report.skipped_count == 1


def test_sparse_content_is_not_taken_for_content(target: Path) -> None:
    archive = Archive(tarfile.PAX_FORMAT).add(
        "s", b"0\n0\n", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "../x"}
    )
    report = unpack(archive.add("after", b"1").end(), target)
    assert os.listdir(target) == ["after"]
    assert report.skipped_count == 1


def test_special_bits_and_owners_are_not_kept(target: Path) -> None:
    archive = (
        Archive()
        .add("s", b"x", mode=0o6777, uid=12345, gid=12345, uname="root")
        .folder("d", 0o7777)
        .folder("closed", 0)
    )
    unpack(archive.add("closed/x", b"1").add("unreadable", b"", mode=0).end(), target)
    for name in ("s", "d"):
        status = (target / name).stat()
        assert status.st_mode & 0o7000 == 0
        assert status.st_uid == os.geteuid()
    # The user must be able to read and remove what came.
    assert (target / "closed").stat().st_mode & 0o700 == 0o700
    assert (target / "unreadable").stat().st_mode & 0o400


def test_hard_links_reach_only_what_this_archive_brought(target: Path) -> None:
    target.mkdir()
    (target / "mine").write_text("mine")
    for victim in ("mine", "../outside/precious", "/etc/passwd", ""):
        with pytest.raises(GuestProtocolError):
            unpack(Archive().link("h", victim, tarfile.LNKTYPE).end(), target)
    report = unpack(Archive().link("h", "absent", tarfile.LNKTYPE).end(), target)
    assert report.skipped_count == 1
    with pytest.raises(ConflictError):
        unpack(Archive().folder("d").link("l", "d").link("h", "l/x", tarfile.LNKTYPE).end(), target)
    with pytest.raises(GuestProtocolError):
        unpack(Archive().add("f", b"1").link("l", "f").link("h", "l", tarfile.LNKTYPE).end(), target)
    assert (target / "mine").stat().st_nlink == 1


def test_writing_through_a_hard_link_changes_no_other_file(target: Path) -> None:
    unpack(Archive().add("a", b"1").link("b", "a", tarfile.LNKTYPE).add("b", b"2").end(), target)
    assert ((target / "a").read_bytes(), (target / "b").read_bytes()) == (b"1", b"2")


def test_counts_and_sizes_are_bounded(target: Path) -> None:
    many = Archive()
    for number in range(20):
        many.link(f"l{number}", "/outside")
    with pytest.raises(GuestProtocolError) as caught:
        unpack(many.end(), target, UnpackLimits(max_entries=19))
    assert caught.value.code == "archive_too_large"
    with pytest.raises(GuestProtocolError) as caught:
        unpack(Archive().add("a", b"x" * 600).add("b", b"x" * 600).end(), target, UnpackLimits(max_total_bytes=1000))
    assert caught.value.code == "archive_too_large"
    assert not (target / "b").exists()


def test_a_false_size_is_refused_before_anything_is_written(target: Path) -> None:
    for size in (1 << 40, (8 << 30) + 5):
        header = bytearray(tarfile.TarInfo("big").tobuf(tarfile.GNU_FORMAT))
        member = tarfile.TarInfo("big")
        member.size = size
        header = member.tobuf(tarfile.GNU_FORMAT)
        with pytest.raises(GuestProtocolError):
            unpack(header, target, UnpackLimits(max_total_bytes=1 << 30))
    assert os.listdir(target) == []


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("start", "field"),
    [
        (124, b"\xff" * 12),
        (124, b"\xc0" + bytes(11)),
        (124, b"notoctal\0\0\0\0"),
        (124, b"\xbf" + b"\xff" * 11),
        (100, b"-0000777"),
    ],
)
def test_numbers_that_are_none_are_refused(target: Path, start: int, field: bytes) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    header[start : start + len(field)] = field
    with pytest.raises(GuestProtocolError) as caught:
        unpack(with_checksum(header) + bytes(1024), target)
    assert caught.value.code == "broken_archive"


def extension(kind: bytes, content: bytes, stated: int | None = None) -> bytes:
    member = tarfile.TarInfo("././@x")
    member.type, member.size = kind, len(content) if stated is None else stated
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "content",
    [
        b"5 a=\n" * 3 + b"x",
        b"0 a=b\n",
        b"999999999999 a=b\n",
        b"99 a=b\n",
        b"6 a=b",
        b"-6 a=b\n",
        b"6  a=b\n",
        b"4 ab\n",
        b"9 size=x\n",
        b"10 size=-1\n",
    ],
)
def test_false_pax_records_are_refused(target: Path, content: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        unpack(extension(b"x", content) + Archive().add("f", b"").end(), target)
    assert not (target / "f").exists()


def test_extension_headers_are_bounded(target: Path) -> None:
    for kind in (b"x", b"g", b"L", b"K"):
        with pytest.raises(GuestProtocolError) as caught:
            unpack(extension(kind, b"", stated=8 << 30), target)
        assert caught.value.code == "broken_archive"


def test_links_and_folders_with_content_are_refused(target: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
        with pytest.raises(GuestProtocolError):
            unpack(Archive().add("x", b"content", kind=kind, linkname="y").end(), target)


def test_a_stream_that_ends_early_is_no_success(target: Path) -> None:
    whole = Archive().add("a", b"x" * 3000).add("b", b"y" * 100).end()
    for cut in (0, 100, 512, 1000, 512 + 3072, len(whole) - 1024 - 300):
        with pytest.raises(GuestProtocolError) as caught:
            unpack(whole[:cut], target)
        assert caught.value.code == "broken_archive"
    assert unpack(whole[:-512], target).file_count == 2
    with pytest.raises(GuestProtocolError):
        unpack(b"\x1f\x8b" + os.urandom(2000), target)


def test_a_member_after_the_end_mark_is_refused(target: Path) -> None:
    evil = Archive().add("evil", b"x").end()
    with pytest.raises(GuestProtocolError):
        unpack(bytes(512) + evil, target)
    assert unpack(bytes(1024) + evil, target).file_count == 0


def test_kinds_do_not_replace_each_other(target: Path) -> None:
    target.mkdir()
    (target / "folder").mkdir()
    (target / "file").write_text("x")
    os.mkfifo(target / "fifo")
    for archive in (
        Archive().add("folder", b"x"),
        Archive().folder("file"),
        Archive().add("file/x"),
        Archive().add("fifo"),
        Archive().link("folder", "x"),
    ):
        with pytest.raises(ConflictError):
            unpack(archive.end(), target)


def test_random_damage_never_leaves_the_target(target: Path) -> None:
    """Whatever the bytes say: an error of ours or a report, and everything that exists lies inside."""
    chance = random.Random(20240229)
    honest = (
        Archive().folder("a").add("a/f", b"x" * 700).link("a/l", "f").link("h", "a/f", tarfile.LNKTYPE).add("n" * 180, b"y").end()
        + Archive(tarfile.PAX_FORMAT).add("ü" * 90, b"z", mtime=1.5).end()
    )  # fmt: skip
    target.mkdir()
    for _ in range(400):
        damaged = bytearray(honest)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.choice((0, 0x2E, 0x2F, 0x80, 0xFF, chance.randrange(256)))
        for start in range(0, len(damaged), 512):
            block = damaged[start : start + 512]
            if block[257:262] == b"ustar":
                damaged[start : start + 512] = with_checksum(block)
        with contextlib.suppress(AtelierError):
            unpack(bytes(damaged), target, UnpackLimits(max_total_bytes=100_000))
    for folder, _, names in os.walk(target):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink():
                assert not os.readlink(path).startswith("/")


def test_descriptors_are_all_closed(target: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for data in (
        Archive().add("a/b/c", b"1").end(),
        Archive().add("a/b/d", b"1" * 600).data[:700],
        Archive().add("../x").end(),
    ):
        with contextlib.suppress(GuestProtocolError):
            unpack(data, target)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_reader_keeps_no_more_than_a_block(target: Path) -> None:
    class Sink:
        largest = 0

        def begin(self, member: object) -> None: ...

        def write(self, data: memoryview) -> None:
            self.largest = max(self.largest, len(data))

        def end(self) -> None: ...

    sink = Sink()
    reader = TarReader(sink)
    member = tarfile.TarInfo("big")
    member.size = 1 << 30
    reader.feed(member.tobuf(tarfile.GNU_FORMAT))
    for _ in range(8):
        reader.feed(bytes(4096))
    assert sink.largest == 4096
    assert len(reader._buffer) == 0
