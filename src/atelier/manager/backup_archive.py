"""The form of a backup: a gzipped tar of plain files, the manifest last.

::

    atelier.db              the database, one file
    token.json              the local key
    bases/<name>            with disks: images that they stand over
    volumes/<id>.qcow2      with disks
    manifest.json           what the backup is and which of the files above are whole

The manifest is last because a disk may turn out to be in use when it was copied already; it also shows that nothing
is cut off. Written by ``manager.backup``, read by ``manager.restore``. Headers are taken one block at a time and only
plain files under the names above are accepted, so a foreign archive can neither reach outside nor have anything large
read into memory; ``tar -xzf`` unpacks it all the same.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from atelier.model.errors import InvalidRequestError
from atelier.model.ids import ID_ALPHABET, SANDBOX_ID_LENGTH
from atelier.model.sandbox import MAX_DISK_MIB

FORMAT_VERSION = 1
DATABASE, TOKEN, MANIFEST = "atelier.db", "token.json", "manifest.json"
VOLUME_NAME = re.compile(rf"volumes/([{ID_ALPHABET}]{{{SANDBOX_ID_LENGTH}}})\.qcow2")
BASE_NAME = re.compile(r"bases/([A-Za-z0-9][A-Za-z0-9._-]{0,79})")

_BLOCK_BYTES = tarfile.BLOCKSIZE
_PIECE_BYTES = 1024 * 1024
_SMALL_MAX_BYTES = 32 * 1024 * 1024
_DATABASE_MAX_BYTES = 64 * 1024**3
_DISK_MAX_BYTES = 2 * MAX_DISK_MIB * 1024**2
"""A qcow2 file is a little larger than its disk when that is full."""
_MEMBERS_MAX = 100_000


class VolumeEntry(BaseModel):
    """A disk that the database refers to. ``size_bytes``: the file's length; ``used_bytes``: what it occupies; ``base``:
    the name in ``bases/`` that it stands over; ``left_out``: why it is not in the backup, empty if it is."""

    model_config = ConfigDict(frozen=True)

    sandbox_id: str
    name: str
    state: str
    size_bytes: int
    used_bytes: int
    base: str = ""
    left_out: str = ""


class Manifest(BaseModel):
    """``schema_revision``: the form of the database; ``created_at``: ISO 8601 in UTC."""

    model_config = ConfigDict(frozen=True)

    format_version: int
    atelier_version: str
    schema_revision: str
    installation_id: str
    created_at: str
    sandboxes: int
    volumes: list[VolumeEntry]


class ArchiveWriter:
    """Writes members one after another into ``file``; ``close`` ends the archive and leaves the file open."""

    def __init__(self, file: BinaryIO) -> None:
        # Level 1: disks and databases shrink nearly as much as at 9, in a fraction of the time.
        self._gzip = gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=1)

    def add(self, name: str, size_bytes: int, pieces: Iterable[bytes], *, modified_at: float = 0) -> None:
        """``pieces`` must be ``size_bytes`` together."""
        header = tarfile.TarInfo(name)
        header.size, header.mode, header.mtime = size_bytes, 0o600, int(modified_at)
        self._gzip.write(header.tobuf(tarfile.GNU_FORMAT))
        written = 0
        for piece in pieces:
            self._gzip.write(piece)
            written += len(piece)
        assert written == size_bytes
        self._gzip.write(bytes(-size_bytes % _BLOCK_BYTES))

    def close(self) -> None:
        # Source: POSIX.1 pax, "ustar Interchange Format": two blocks of zeros end an archive.
        self._gzip.write(bytes(2 * _BLOCK_BYTES))
        self._gzip.close()


class ArchiveReader:
    """``members`` yields name, size and pieces of each file in turn; what was not read of one is passed over.

    Raises InvalidRequestError (``backup_damaged``) for all that is not a backup.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")

    def members(self) -> Iterator[tuple[str, int, Iterator[bytes]]]:
        seen: set[str] = set()
        while (block := self._read(_BLOCK_BYTES)).strip(b"\0"):
            name, size = self._understand(block)
            if name in seen or len(seen) >= _MEMBERS_MAX:
                raise self.damaged(f"it holds {name} twice, or too many files")
            seen.add(name)
            pieces = self._pieces(size)
            yield name, size, pieces
            for _ in pieces:
                pass
            self._read(-size % _BLOCK_BYTES)
        # To the end, so that the checksum over everything is compared.
        while self._read(_PIECE_BYTES, short=True):
            pass

    def damaged(self, reason: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self._path} cannot be restored: {reason}",
            code="backup_damaged",
            hint="nothing was changed; take another backup file, made by `atelier backup`",
        )

    def _understand(self, block: bytes) -> tuple[str, int]:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise self.damaged(f"it is not an archive of Atelier's ({error})") from error
        limit = _size_limit(header.name)
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or limit == 0:
            raise self.damaged(f"it holds {header.name!r}, which no backup holds")
        if not 0 <= header.size <= limit:
            raise self.damaged(f"{header.name} is beyond all bounds ({header.size} bytes)")
        return header.name, header.size

    def _pieces(self, size_bytes: int) -> Iterator[bytes]:
        left = size_bytes
        while left:
            piece = self._read(min(_PIECE_BYTES, left))
            left -= len(piece)
            yield piece

    def _read(self, count: int, *, short: bool = False) -> bytes:
        try:
            data = self._gzip.read(count)
        except EOFError as error:
            raise self.damaged("it is cut off") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise self.damaged(f"it is not a gzipped archive, or damaged ({error})") from error
        if len(data) < count and not short:
            raise self.damaged("it is cut off")
        return data


def _size_limit(name: str) -> int:
    """The bytes that a member of this name may have; 0 if there is no such member."""
    if name == DATABASE:
        return _DATABASE_MAX_BYTES
    if name in (TOKEN, MANIFEST):
        return _SMALL_MAX_BYTES
    return _DISK_MAX_BYTES if VOLUME_NAME.fullmatch(name) or BASE_NAME.fullmatch(name) else 0
