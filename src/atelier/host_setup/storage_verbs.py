"""Root's side of the LVM storage driver: thin volumes of this installation, in the one pool that root's settings name.

A request names a kind and an id, never a volume: its name is built here and bears the installation's id, so nothing of
anybody else's can be meant. What is used is reached by a device node of the manager's own below /dev/atelier.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from atelier.host.block_devices import leads_to, make_device_node
from atelier.host.lvm import LogicalVolume, PoolUsage, ThinPool
from atelier.host_setup.root_settings import RootSettings
from atelier.model.errors import CommandError, ConflictError, DiskFullError, HostError, NotFoundError
from atelier.model.lvm_names import CHECKSUM_TAG, FREEZING_TAG, SIZE_TAG, LvmKind, LvmName, is_known_tag

Request = dict[str, Any]

NODES = Path("/dev/atelier")
DATA_LIMIT, METADATA_LIMIT = 0.95, 0.90
"""Nothing new is made in a pool that is fuller: what is there needs the rest to be written to. A pool whose metadata
overflow has to be repaired by hand."""
_SIZE_MAX_BYTES = 1 << 50
_READ_ONLY_KINDS = (LvmKind.BASE, LvmKind.SNAPSHOT)


class StorageVerbs:
    """``lock``: as for ``ThinPool``."""

    def __init__(self, settings: RootSettings, nodes: Path = NODES, *, lock: int | None = None) -> None:
        if not settings.volume_group or not settings.thin_pool:
            raise HostError(
                "root's settings name no volume group and no thin pool",
                code="thin_pool_missing",
                hint="as root: atelier host storage",
            )
        self._settings = settings
        self._pool = ThinPool(settings.volume_group, settings.thin_pool, lock=lock)
        self._nodes = nodes / settings.installation_id

    @property
    def verbs(self) -> Mapping[str, Callable[[Request], Awaitable[dict[str, Any]]]]:
        return {
            "look": self.look,
            "create_base": self.create_base,
            "finish_base": self.finish_base,
            "create_volume": self.create_volume,
            "expose": self.expose,
            "grow": self.grow,
            "begin_freezing": self.begin_freezing,
            "freeze": self.freeze,
            "end_freezing": self.end_freezing,
            "set_checksum": self.set_checksum,
            "create_import": self.create_import,
            "finish_import": self.finish_import,
            "remove": self.remove,
        }

    async def look(self, request: Request) -> dict[str, Any]:
        """``{"pool": ..., "volumes": [...]}``: all of this installation's."""
        _only(request)
        usage, found = await self._pool.look()
        volumes: list[dict[str, Any]] = []
        for name, volume in found.items():
            parsed = LvmName.parse(name)
            if parsed is not None and parsed.installation_id == self._settings.installation_id:
                origin = found.get(volume.origin)
                # An origin is no larger, so this covers what both are told wrong by.
                shared = origin.used_bytes + volume.grain_bytes if origin else 0
                made_from = LvmName.parse(volume.origin)
                volumes.append(
                    {
                        "kind": parsed.kind,
                        "id": parsed.id,
                        "size_bytes": _tagged_size(volume),
                        "used_bytes": volume.used_bytes,
                        "own_bytes": max(0, volume.used_bytes - shared),
                        "freezing": [tag[len(FREEZING_TAG) :] for tag in volume.tags if tag.startswith(FREEZING_TAG)],
                        "checksum": next(
                            (t[len(CHECKSUM_TAG) :] for t in volume.tags if t.startswith(CHECKSUM_TAG)), ""
                        ),
                        "path": str(self._node(parsed)),
                        "whole": volume.size_bytes >= _tagged_size(volume),
                        "base_id": made_from.id if made_from and made_from.kind is LvmKind.BASE else "",
                    }
                )
        return {
            "pool": {
                "size_bytes": usage.size_bytes,
                "data_used": usage.data_used,
                "metadata_used": usage.metadata_used,
                "extensible_bytes": usage.extensible_bytes,
            },
            "volumes": volumes,
        }

    async def create_base(self, request: Request) -> dict[str, Any]:
        """An empty volume for an image's bytes, which becomes a base by ``finish_base``; one begun before goes."""
        return await self._create_fresh(LvmKind.UNFINISHED_BASE, request)

    async def finish_base(self, request: Request) -> dict[str, Any]:
        _only(request, "id")
        fresh, base = self._name(LvmKind.UNFINISHED_BASE, request["id"]), self._name(LvmKind.BASE, request["id"])
        await self._publish(fresh, base)
        return {}

    async def create_import(self, request: Request) -> dict[str, Any]:
        """As ``create_base``, for the disk of a snapshot that comes from elsewhere."""
        return await self._create_fresh(LvmKind.UNFINISHED_SNAPSHOT, request)

    async def finish_import(self, request: Request) -> dict[str, Any]:
        _only(request, "id", "checksum")
        tag = _tag(CHECKSUM_TAG, request["checksum"])
        fresh = self._name(LvmKind.UNFINISHED_SNAPSHOT, request["id"])
        await self._pool.set_tags(str(fresh), add=[tag])
        await self._publish(fresh, self._name(LvmKind.SNAPSHOT, request["id"]))
        return {}

    async def create_volume(self, request: Request) -> dict[str, Any]:
        """Over a base or a snapshot; one that is there is made whole where its making was broken off.

        Raises NotFoundError (``disk_file_missing``) where there is no such source, DiskFullError (``pool_full``).
        """
        _only(request, "id", "source_kind", "source_id", "size_bytes")
        volume = self._name(LvmKind.VOLUME, request["id"])
        source = self._name(LvmKind(request["source_kind"]), request["source_id"])
        if source.kind not in _READ_ONLY_KINDS:
            raise ValueError(f"a volume is not made over a {source.kind}")
        size_bytes = _size(request["size_bytes"])
        usage, found = await self._pool.look()
        if str(volume) not in found:
            if str(source) not in found:
                raise NotFoundError(f"there is no disk {source}", code="disk_file_missing")
            self._refuse_when_full(usage)
            await self._pool.snapshot(str(volume), str(source), read_only=False, tags=[_tag(SIZE_TAG, str(size_bytes))])
            if size_bytes > found[str(source)].size_bytes:
                await self._pool.extend(str(volume), size_bytes)
        return await self._expose(volume)

    async def expose(self, request: Request) -> dict[str, Any]:
        """Have the manager's device node of a volume: after a reboot there is none."""
        _only(request, "kind", "id")
        return await self._expose(self._name(LvmKind(request["kind"]), request["id"]))

    async def grow(self, request: Request) -> dict[str, Any]:
        """To at least this size, which it then has whatever happens in between."""
        _only(request, "id", "size_bytes")
        volume = self._name(LvmKind.VOLUME, request["id"])
        size_bytes = _size(request["size_bytes"])
        present = await self._find(volume)
        if size_bytes > _tagged_size(present):
            old = [tag for tag in present.tags if tag.startswith(SIZE_TAG)]
            await self._pool.set_tags(str(volume), add=[_tag(SIZE_TAG, str(size_bytes))], remove=old)
        if size_bytes > present.size_bytes:
            await self._pool.extend(str(volume), size_bytes)
        return {}

    async def begin_freezing(self, request: Request) -> dict[str, Any]:
        """Note what the volume is frozen for, and let go of what an earlier attempt has frozen."""
        _only(request, "id", "snapshot_id")
        snapshot = self._name(LvmKind.SNAPSHOT, request["snapshot_id"])
        _, found = await self._pool.look()
        if (earlier := found.get(str(snapshot))) is not None:
            if any(tag.startswith(CHECKSUM_TAG) for tag in earlier.tags):
                raise ConflictError(f"snapshot {snapshot.id} has its disk already", code="snapshot_exists")
            await self._remove(snapshot)
        tag = _tag(FREEZING_TAG, snapshot.id)
        await self._pool.set_tags(str(self._name(LvmKind.VOLUME, request["id"])), add=[tag])
        return {}

    async def freeze(self, request: Request) -> dict[str, Any]:
        """What is in the volume now is what the snapshot has; nothing if it was frozen since freezing began."""
        _only(request, "id", "snapshot_id")
        volume = self._name(LvmKind.VOLUME, request["id"])
        snapshot = self._name(LvmKind.SNAPSHOT, request["snapshot_id"])
        usage, found = await self._pool.look()
        present = found.get(str(volume))
        if present is None or _tag(FREEZING_TAG, snapshot.id) not in present.tags:
            raise NotFoundError(f"volume {volume.id} is not being frozen for {snapshot.id}", code="layer_not_found")
        if str(snapshot) not in found:
            self._refuse_when_full(usage)
            size = _tag(SIZE_TAG, str(_tagged_size(present)))
            await self._pool.snapshot(str(snapshot), str(volume), read_only=True, tags=[size])
        return {}

    async def end_freezing(self, request: Request) -> dict[str, Any]:
        """``keep`` false: nothing is frozen then."""
        _only(request, "id", "snapshot_id", "keep")
        volume = self._name(LvmKind.VOLUME, request["id"])
        snapshot = self._name(LvmKind.SNAPSHOT, request["snapshot_id"])
        _, found = await self._pool.look()
        if request["keep"] is not True and str(snapshot) in found:
            await self._remove(snapshot)
        tag = _tag(FREEZING_TAG, snapshot.id)
        if (present := found.get(str(volume))) is not None and tag in present.tags:
            await self._pool.set_tags(str(volume), remove=[tag])
        return {}

    async def set_checksum(self, request: Request) -> dict[str, Any]:
        """The snapshot's disk is made, with this in it."""
        _only(request, "id", "checksum")
        snapshot = self._name(LvmKind.SNAPSHOT, request["id"])
        await self._pool.set_tags(str(snapshot), add=[_tag(CHECKSUM_TAG, request["checksum"])])
        return {}

    async def remove(self, request: Request) -> dict[str, Any]:
        """Nothing if it is gone. Raises HostError (``volume_in_use``)."""
        _only(request, "kind", "id")
        name = self._name(LvmKind(request["kind"]), request["id"])
        _, found = await self._pool.look()
        if str(name) in found:
            await self._remove(name)
        else:
            self._node(name).unlink(missing_ok=True)
        return {}

    async def _create_fresh(self, kind: LvmKind, request: Request) -> dict[str, Any]:
        _only(request, "id", "size_bytes")
        name, size_bytes = self._name(kind, request["id"]), _size(request["size_bytes"])
        usage, found = await self._pool.look()
        if str(name) in found:
            await self._remove(name)
        self._refuse_when_full(usage)
        await self._pool.create(str(name), size_bytes)
        await self._pool.set_tags(str(name), add=[_tag(SIZE_TAG, str(size_bytes))])
        return await self._expose(name)

    async def _publish(self, fresh: LvmName, name: LvmName) -> None:
        """Read-only, then under the name by which it counts as whole."""
        await self._pool.make_read_only(str(fresh))
        self._node(fresh).unlink(missing_ok=True)
        await self._pool.rename(str(fresh), str(name))

    async def _expose(self, name: LvmName) -> dict[str, Any]:
        node, device = self._node(name), self._pool.device(str(name))
        mode = 0o400 if name.kind in _READ_ONLY_KINDS else 0o600
        owner = self._settings.owner
        if not device.exists():
            # As after a reboot for one whose node is not made by LVM.
            try:
                await self._pool.activate(str(name))
            except CommandError:
                raise NotFoundError(f"there is no volume {name}", code="volume_not_found") from None
        if not leads_to(node, device, owner=owner, mode=mode):
            self._nodes.mkdir(mode=0o755, parents=True, exist_ok=True)
            for folder in (self._nodes.parent, self._nodes):
                folder.chmod(0o755)
            make_device_node(node, device, owner=owner, mode=mode)
        return {"path": str(node)}

    async def _remove(self, name: LvmName) -> None:
        # The node first: its number may be somebody else's disk a moment after.
        self._node(name).unlink(missing_ok=True)
        await self._pool.remove(str(name))

    async def _find(self, name: LvmName) -> LogicalVolume:
        _, found = await self._pool.look()
        if str(name) not in found:
            raise NotFoundError(f"there is no {name.kind} {name.id}", code="volume_not_found")
        return found[str(name)]

    def _refuse_when_full(self, usage: PoolUsage) -> None:
        for what, used, limit in (
            ("data", usage.data_used, DATA_LIMIT),
            ("metadata", usage.metadata_used, METADATA_LIMIT),
        ):
            if used >= limit:
                raise DiskFullError(
                    f"the thin pool's {what} are {used:.0%} full: nothing new is made in it above {limit:.0%}",
                    code="pool_full",
                    hint=self._pool.remedy,
                )

    def _name(self, kind: LvmKind, text: object) -> LvmName:
        return LvmName(self._settings.installation_id, kind, _word(text))

    def _node(self, name: LvmName) -> Path:
        return self._nodes / f"{name.kind}-{name.id}"


def _tagged_size(volume: LogicalVolume) -> int:
    """What it was asked to have; LVM rounds up."""
    sizes = [int(tag[len(SIZE_TAG) :]) for tag in volume.tags if tag.startswith(SIZE_TAG) and is_known_tag(tag)]
    return max(sizes, default=volume.size_bytes)


def _tag(kind: str, value: object) -> str:
    tag = f"{kind}{_word(value)}"
    if not is_known_tag(tag):
        raise ValueError(f"{value!r} does not fit {kind}")
    return tag


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _SIZE_MAX_BYTES:
        raise ValueError(f"{value!r} is no size of a disk")
    return value


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no word")
    return value


def _only(request: Request, *fields: str) -> None:
    if set(request) != set(fields):
        raise ValueError(f"this verb takes {', '.join(fields) or 'nothing'}, not {', '.join(request) or 'nothing'}")
