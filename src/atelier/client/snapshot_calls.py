"""The routes of snapshots and forks: what is sent, and how the answer is read. Without I/O.

``snapshots.py`` and ``sandbox.py`` give them to people.
"""

from __future__ import annotations

from collections.abc import Mapping

from atelier.client.addresses import encode_query, encode_segment
from atelier.client.call import (
    ANSWER_TIMEOUT_SECONDS,
    API,
    WAIT_AT_MOST_SECONDS,
    Call,
    make_patch,
    read_model,
    read_nothing,
    sandbox_path,
    wait_query,
)
from atelier.schemas.sandboxes import ForkRequest, SandboxList
from atelier.schemas.snapshots import Snapshot, SnapshotPage, TakeSnapshotRequest

_FORK_WAIT_AT_MOST_SECONDS = 3600.0


def take_snapshot(
    sandbox: str, *, name: str | None, labels: Mapping[str, str] | None, keep_last: int | None, wait_seconds: float
) -> Call[Snapshot]:
    operation = f"take a snapshot of the sandbox {sandbox}"
    asked = {"name": name, "labels": dict(labels) if labels else None, "keep_last": keep_last}
    body = make_patch(
        TakeSnapshotRequest, operation, **{key: value for key, value in asked.items() if value is not None}
    )
    wait_seconds = min(wait_seconds, WAIT_AT_MOST_SECONDS)
    return Call(
        operation,
        "POST",
        sandbox_path(sandbox, f"/snapshots{wait_query(wait_seconds)}"),
        read_model(Snapshot, operation),
        body,
        read_timeout_seconds=wait_seconds + ANSWER_TIMEOUT_SECONDS,
    )


def fork_sandbox(
    sandbox: str,
    *,
    count: int,
    name_prefix: str | None,
    labels: Mapping[str, str] | None,
    wait: bool,
    timeout_seconds: float,
) -> Call[SandboxList]:
    """Also without ``wait`` the answer comes when the sandbox is saved: before that there are no forks to tell of."""
    operation = f"fork the sandbox {sandbox}"
    asked = {"count": count, "name_prefix": name_prefix, "labels": dict(labels) if labels else None}
    body = make_patch(ForkRequest, operation, **{key: value for key, value in asked.items() if value is not None})
    seconds = min(timeout_seconds, _FORK_WAIT_AT_MOST_SECONDS)
    query = encode_query([("wait", "true" if wait else "false"), ("timeout_seconds", f"{seconds:g}")])
    return Call(
        operation,
        "POST",
        sandbox_path(sandbox, f"/fork{query}"),
        read_model(SandboxList, operation),
        body,
        read_timeout_seconds=seconds + ANSWER_TIMEOUT_SECONDS,
    )


def list_snapshots(
    *, limit: int, cursor: str | None, sandbox: str | None, labels: Mapping[str, str] | None
) -> Call[SnapshotPage]:
    operation = "list the snapshots"
    query: list[tuple[str, str | bytes | int]] = [("limit", limit)]
    if cursor is not None:
        query.append(("cursor", cursor))
    if sandbox is not None:
        query.append(("sandbox", sandbox))
    query.extend(("label", f"{key}={value}") for key, value in (labels or {}).items())
    path = f"{API}/snapshots{encode_query(query)}"
    return Call(operation, "GET", path, read_model(SnapshotPage, operation), repeatable=True)


def get_snapshot(snapshot: str) -> Call[Snapshot]:
    operation = f"look up the snapshot {snapshot}"
    return Call(operation, "GET", _path(snapshot), read_model(Snapshot, operation), repeatable=True)


def delete_snapshot(snapshot: str) -> Call[None]:
    timeout = WAIT_AT_MOST_SECONDS + ANSWER_TIMEOUT_SECONDS
    operation = f"delete the snapshot {snapshot}"
    return Call(operation, "DELETE", _path(snapshot), read_nothing, read_timeout_seconds=timeout)


def _path(snapshot: str) -> str:
    return f"{API}/snapshots/{encode_segment(snapshot, 'snapshot')}"
