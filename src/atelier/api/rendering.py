"""Values of the model as bodies of the API."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict

from atelier.lifecycle.warm_pools import PoolState
from atelier.model import guest, image, network_policy, sandbox, snapshot
from atelier.schemas.errors import ErrorBody
from atelier.schemas.files import FileEntry
from atelier.schemas.images import Image
from atelier.schemas.networks import NetworkPolicy, NetworkUsage, SandboxNetwork
from atelier.schemas.processes import EndedEvent, OutputEvent, Process, StartedEvent
from atelier.schemas.sandboxes import Sandbox
from atelier.schemas.snapshots import Snapshot
from atelier.schemas.warm_pools import WarmPool
from atelier.services.networks import NetworkState


def render_sandbox(row: sandbox.Sandbox) -> Sandbox:
    return Sandbox(
        id=row.id,
        name=row.name,
        state=row.state,
        image=row.spec.image,
        image_id=row.spec.image_id,
        vcpu_count=row.spec.vcpu_count,
        memory_mib=row.spec.memory_mib,
        disk_mib=row.spec.disk_mib,
        labels=row.spec.labels,
        created_at=row.created_at,
        updated_at=row.updated_at,
        stop_reason=row.stop_reason,
        auto_stop_after_idle_seconds=row.spec.auto_stop_after_idle_seconds,
        expires_at=row.spec.expires_at,
        last_active_at=row.last_active_at,
        snapshot_id=row.snapshot_id,
        failure=_render_failure(row),
        console_tail=row.console_tail or None,
    )


def render_snapshot(row: snapshot.Snapshot) -> Snapshot:
    return Snapshot(
        id=row.id,
        name=row.name,
        state=row.state,
        purpose=row.purpose,
        sandbox_id=row.sandbox_id,
        sandbox_name=row.sandbox_name,
        parent_id=row.parent_id,
        image=row.image,
        image_id=row.image_id,
        vcpu_count=row.vcpu_count,
        memory_mib=row.memory_mib,
        disk_mib=row.disk_mib,
        memory_bytes=row.memory_bytes,
        disk_bytes=row.disk_bytes,
        stopped_ms=row.stopped_ms,
        labels=row.labels,
        keep_last=row.keep_last,
        created_at=row.created_at,
        updated_at=row.updated_at,
        failure=_render_failure(row),
    )


def _render_failure(row: sandbox.Sandbox | snapshot.Snapshot) -> ErrorBody | None:
    if not row.failure_code:
        return None
    return ErrorBody(code=row.failure_code, message=row.failure_message, hint=row.failure_hint)


def parse_network_policy(body: NetworkPolicy) -> network_policy.NetworkPolicy:
    """Raises InvalidRequestError, naming the entry that is wrong."""
    return network_policy.NetworkPolicy.from_json(body.model_dump(mode="json"))


def render_network(state: NetworkState) -> SandboxNetwork:
    usage = state.usage
    return SandboxNetwork(
        policy=NetworkPolicy.model_validate(state.policy.to_json()),
        in_force=state.is_in_force,
        connected=not state.not_connected_reason,
        not_connected_reason=state.not_connected_reason or None,
        address=state.address or None,
        gateway=state.gateway or None,
        usage=None if usage is None else NetworkUsage.model_validate(asdict(usage)),
    )


def render_warm_pool(state: PoolState) -> WarmPool:
    pool, trouble = state.pool, state.trouble
    return WarmPool(
        image=pool.image,
        vcpu_count=pool.vcpu_count,
        memory_mib=pool.memory_mib,
        size=pool.size,
        ready=state.ready,
        coming=state.coming,
        failure=None if trouble is None else ErrorBody(code=trouble.code, message=trouble.message, hint=trouble.hint),
    )


def render_image(built: image.Image) -> Image:
    return Image(
        id=built.id,
        name=built.name,
        size_mib=built.size_mib,
        stored_bytes=built.stored_bytes,
        built_at=built.built_at,
    )


def render_entry(entry: guest.FileEntry) -> FileEntry:
    exact = entry.path.encode(errors="replace") == entry.raw_path
    return FileEntry(
        name=entry.name,
        path=entry.path,
        path_base64=None if exact else base64.b64encode(entry.raw_path).decode(),
        type=entry.type,
        size_bytes=entry.size_bytes,
        mode=entry.mode,
        owner=entry.owner,
        group=entry.group,
        modified_at=entry.modified_at,
        symlink_target=entry.symlink_target or None,
    )


def render_process(process: guest.ProcessSummary) -> Process:
    return Process(
        pid=process.pid,
        command=list(process.arguments),
        working_directory=process.working_directory,
        tag=process.tag,
        terminal=process.terminal,
    )


async def render_events(
    events: AsyncGenerator[guest.ProcessEvent],
) -> AsyncGenerator[StartedEvent | OutputEvent | EndedEvent]:
    async with aclosing(events):
        async for event in events:
            match event:
                case guest.ProcessStarted():
                    yield StartedEvent(pid=event.pid)
                case guest.ProcessOutput():
                    yield OutputEvent(stream=event.stream, data=base64.b64encode(event.data).decode())
                case guest.ProcessEnded():
                    yield EndedEvent(exit_code=event.exit_code, status=event.status, error=event.error)
