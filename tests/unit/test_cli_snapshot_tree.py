"""The tree that ``atelier snapshots ls --tree`` draws."""

from __future__ import annotations

from datetime import UTC, datetime

from atelier.cli.commands.snapshots import arrange_as_tree
from atelier.model.snapshot import SnapshotPurpose, SnapshotState
from atelier.schemas.snapshots import Snapshot

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def test_a_tree_is_drawn_with_each_below_its_parent() -> None:
    def described(name: str, parent: str | None = None) -> Snapshot:
        return Snapshot(
            id=name, name=name, state=SnapshotState.READY, purpose=SnapshotPurpose.USER, sandbox_id="s",
            sandbox_name="s", parent_id=parent, image="base", image_id="base-1", vcpu_count=1, memory_mib=512,
            disk_mib=4096, memory_bytes=1, disk_bytes=1, stopped_ms=1, labels={}, created_at=NOW, updated_at=NOW,
        )  # fmt: skip

    found = [
        described("a"),
        described("b", "a"),
        described("c", "a"),
        described("d", "b"),
        described("e", "gone"),
        described("f", "e"),
    ]
    drawn = [indent + each.name for indent, each in arrange_as_tree(found)]
    assert drawn == ["a", "├─ b", "│  └─ d", "└─ c", "e", "└─ f"]
    chain = [described("0"), *(described(str(n), str(n - 1)) for n in range(1, 3000))]
    assert len(arrange_as_tree(chain)) == 3000
