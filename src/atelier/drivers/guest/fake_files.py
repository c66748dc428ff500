"""The file system of a fake guest: a few nodes in memory, nothing on the host.

Used by ``fake`` only. Users are ignored but for their homes; links exist (an archive may bring them) and are followed
at a path's end only. A fresh one holds five folders and costs about a kilobyte.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from atelier.model.errors import AtelierError, ConflictError, GuestError, InvalidRequestError, NotFoundError
from atelier.model.guest import EntryType, FileEntry

_FOLDERS = (b"/", b"/home", b"/home/user", b"/root", b"/tmp")
_LINKS_MAX = 40


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class _Node:
    type: EntryType
    content: bytes = b""
    """What a file holds, or where a link leads."""
    mode: int = 0o755
    modified_at: datetime = field(default_factory=_now)


def _show(path: bytes) -> str:
    return path.decode(errors="replace")


def _absent(path: bytes) -> AtelierError:
    return NotFoundError(f"{_show(path)}: no such file or directory", code="path_not_found")


class FakeFiles:
    """Paths may be relative to the home of ``user``, as in a real guest."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        for folder in _FOLDERS:
            self._nodes[folder] = _Node(EntryType.DIRECTORY)

    def dump(self) -> list[dict[str, Any]]:
        """All of it in JSON's kinds of values, for ``load``."""
        return [
            {
                "path": path.hex(),
                "type": node.type.value,
                "content": node.content.hex(),
                "mode": node.mode,
                "modified_at": node.modified_at.isoformat(),
            }
            for path, node in self._nodes.items()
        ]

    @classmethod
    def load(cls, dumped: list[dict[str, Any]]) -> FakeFiles:
        files = cls()
        files._nodes = {
            bytes.fromhex(item["path"]): _Node(
                EntryType(item["type"]),
                bytes.fromhex(item["content"]),
                item["mode"],
                datetime.fromisoformat(item["modified_at"]),
            )
            for item in dumped
        }
        return files

    @property
    def used_bytes(self) -> int:
        return sum(len(node.content) for node in self._nodes.values())

    def resolve(self, path: bytes, user: str) -> bytes:
        if b"\0" in path:
            raise InvalidRequestError("a path cannot hold a NUL byte")
        home = b"/root" if user == "root" else b"/home/user"
        if path == b"~" or path.startswith(b"~/"):
            path = home + path[1:]
        return b"/" + posixpath.normpath(posixpath.join(home, path)).lstrip(b"/")

    def _followed(self, path: bytes) -> bytes:
        for _ in range(_LINKS_MAX):
            node = self._nodes.get(path)
            if node is None or node.type is not EntryType.SYMLINK:
                return path
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path), node.content))
        raise InvalidRequestError(f"{_show(path)}: too many levels of symbolic links")

    def _get(self, path: bytes) -> _Node:
        node = self._nodes.get(path)
        if node is None:
            raise _absent(path)
        return node

    def stat(self, path: bytes) -> FileEntry:
        node = self._get(path)
        name = posixpath.basename(path) or b"/"
        is_link = node.type is EntryType.SYMLINK
        return FileEntry(
            name=_show(name),
            path=_show(path),
            raw_path=path,
            type=node.type,
            size_bytes=len(node.content),
            mode=node.mode,
            owner="user",
            group="user",
            modified_at=node.modified_at,
            symlink_target=_show(node.content) if is_link else "",
        )

    def _below(self, path: bytes) -> Iterator[bytes]:
        inside = b"/" if path == b"/" else path + b"/"
        return (other for other in list(self._nodes) if other.startswith(inside) and other != path)

    def list(self, path: bytes, depth: int) -> list[FileEntry]:
        path = self._followed(path)
        if self._get(path).type is not EntryType.DIRECTORY:
            raise InvalidRequestError(f"{_show(path)} is no folder")
        found = ((other[len(path) :].strip(b"/").split(b"/"), other) for other in self._below(path))
        return [self.stat(other) for components, other in sorted(found) if len(components) <= max(depth, 1)]

    def make_directory(self, path: bytes) -> FileEntry:
        node = self._nodes.get(self._followed(path))
        if node is not None and node.type is EntryType.DIRECTORY:
            raise ConflictError(f"the folder {_show(path)} exists already", code="already_exists")
        if path in self._nodes:
            raise InvalidRequestError(f"{_show(path)} exists already and is no folder")
        self.make_parents(path)
        return self.stat(path)

    def make_parents(self, path: bytes) -> None:
        missing: list[bytes] = []
        while (node := self._nodes.get(self._followed(path))) is None:
            missing.append(path)
            path = posixpath.dirname(path)
        if node.type is not EntryType.DIRECTORY:
            raise NotFoundError(f"{_show(path)}: not a directory", code="path_not_found")
        for folder in reversed(missing):
            self._nodes[folder] = _Node(EntryType.DIRECTORY)

    def move(self, source: bytes, destination: bytes) -> FileEntry:
        node = self._get(source)
        if destination == source:
            return self.stat(source)
        if destination.startswith(source + b"/"):
            raise InvalidRequestError(f"cannot move {_show(source)} into itself")
        self.make_parents(posixpath.dirname(destination))
        there = self._nodes.get(destination)
        if there is not None:
            if next(self._below(destination), None) is not None:
                raise GuestError(f"cannot move to {_show(destination)}: directory not empty")
            if (there.type is EntryType.DIRECTORY) != (node.type is EntryType.DIRECTORY):
                raise InvalidRequestError(f"cannot move to {_show(destination)}: one of them is a folder")
        for inner in self._below(source):
            self._nodes[destination + inner[len(source) :]] = self._nodes.pop(inner)
        self._nodes[destination] = self._nodes.pop(source)
        return self.stat(destination)

    def remove(self, path: bytes) -> None:
        if path == b"/":
            raise InvalidRequestError("the root folder cannot be removed")
        for inner in self._below(path):
            del self._nodes[inner]
        self._nodes.pop(path, None)

    def read(self, path: bytes) -> bytes:
        path = self._followed(path)
        node = self._get(path)
        if node.type is EntryType.DIRECTORY:
            raise InvalidRequestError(f"cannot read {_show(path)}: it is a folder")
        return node.content

    def write(self, path: bytes, content: bytes, mode: int = 0o644) -> FileEntry:
        path = self._followed(path)
        node = self._nodes.get(path)
        if node is not None and node.type is EntryType.DIRECTORY:
            raise InvalidRequestError(f"cannot write {_show(path)}: it is a folder")
        self.make_parents(posixpath.dirname(path))
        self._nodes[path] = _Node(EntryType.FILE, content, node.mode if node is not None else mode)
        return self.stat(path)

    def pack(self, path: bytes) -> bytes:
        """The folder's content as a tar."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", encoding="utf-8", errors="surrogateescape") as archive:
            for entry in self.list(path, 2**31):
                relative = entry.raw_path[len(self._followed(path)) :].lstrip(b"/")
                item = tarfile.TarInfo("./" + relative.decode("utf-8", "surrogateescape"))
                item.mode, item.mtime = entry.mode, int(entry.modified_at.timestamp())
                content = self._nodes[entry.raw_path].content
                if entry.type is EntryType.DIRECTORY:
                    item.type = tarfile.DIRTYPE
                elif entry.type is EntryType.SYMLINK:
                    item.type, item.linkname = tarfile.SYMTYPE, content.decode("utf-8", "surrogateescape")
                else:
                    item.size = len(content)
                archive.addfile(item, io.BytesIO(content))
        return buffer.getvalue()

    def unpack(self, path: bytes, content: bytes) -> None:
        """Unpack a tar into the folder ``path``, made if absent. Names that lead out of it are refused."""
        self.make_parents(path)
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:", errors="surrogateescape") as archive:
                for item in archive:
                    name = item.name.encode("utf-8", "surrogateescape")
                    if name.startswith(b"/") or b".." in name.split(b"/"):
                        raise InvalidRequestError(f"cannot unpack into {_show(path)}: {_show(name)} leads out of it")
                    target = posixpath.normpath(posixpath.join(path, name))
                    if item.isdir():
                        self.make_parents(target)
                        self._nodes[target].mode = item.mode & 0o7777
                    elif item.issym():
                        link = item.linkname.encode("utf-8", "surrogateescape")
                        self._nodes[target] = _Node(EntryType.SYMLINK, link, 0o777)
                    elif item.isfile() and (file := archive.extractfile(item)) is not None:
                        self._nodes.pop(target, None)
                        self.write(target, file.read(), item.mode & 0o7777)
        except tarfile.TarError as error:
            raise InvalidRequestError(f"cannot unpack into {_show(path)}: {error}") from error
