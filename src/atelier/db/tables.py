"""The tables. ``migrations/`` brings an older file to this form; a test holds the two together.

Imported by this room's repositories alone.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Float, Index, Integer, MetaData, Table, Text, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

SCHEMA_REVISION = "0007"
"""The newest file in ``migrations/versions``. Revisions are numbers of four digits, so they can be compared."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time, stored as ISO 8601 text in UTC with microseconds: readable, and in order as text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        return None if value is None else value.astimezone(UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


metadata = MetaData()

sandboxes = Table(
    "sandboxes",
    metadata,
    # Counts up and is never used again: the order of lists, whatever the clock does.
    Column("sequence", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("name", Text, nullable=False, unique=True),
    Column("host_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("image", Text, nullable=False),
    Column("image_id", Text, nullable=False),
    Column("vcpu_count", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("environment", JSON, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("guest_token", Text, nullable=False),
    Column("machine_id", Text, nullable=False),
    # Whether disk_mib counts against the host: a sandbox whose creation failed keeps its row, not its volume.
    Column("holds_volume", Boolean, nullable=False),
    Column("vmm_pid", Integer),
    Column("vmm_start_time_ticks", Integer),
    Column("vmm_boot_id", Text),
    Column("failure_code", Text, nullable=False),
    Column("failure_message", Text, nullable=False),
    Column("failure_hint", Text, nullable=False),
    Column("console_tail", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    # Why it is stopped ('requested', 'forced', 'idle'); empty in every other state.
    Column("stop_reason", Text, nullable=False, server_default=""),
    Column("file_system_mib", Integer, nullable=False, server_default="0"),
    Column("auto_stop_after_idle_seconds", Integer),
    Column("expires_at", UtcDateTime),
    Column("last_active_at", UtcDateTime),
    # Which of the host's network slots it has; its addresses follow from it.
    Column("network_lease", Integer),
    # What the guest has in its slot; null where the slot has no addresses, and where there is no slot.
    Column("network_address", Text),
    Column("network_gateway", Text),
    # Whether the policy is written down and perhaps not in force yet.
    Column("network_pending", Boolean, nullable=False, server_default="0"),
    # NetworkPolicy.to_json; null: the open policy, which all had before there were others.
    Column("network_policy", JSON(none_as_null=True)),
    # MachineRecord.to_json: what its machine was made of when it last began to run.
    Column("machine", JSON(none_as_null=True)),
    # The snapshot that it began from; null: its image, or a template.
    Column("snapshot_id", Text),
    # Whether only its disk began from there: it booted, with a memory of its own.
    Column("disk_only", Boolean, nullable=False, server_default="0"),
    Column("purpose", Text, nullable=False, server_default="user"),
    # SavedMemory.to_json: of a paused sandbox.
    Column("saved_memory", JSON(none_as_null=True)),
    # The user whose it is; empty: Atelier's own.
    Column("owner_id", Text, nullable=False, server_default=""),
    Index("sandboxes_by_lease", "host_id", "network_lease", unique=True),
    Index("sandboxes_by_owner", "owner_id"),
    sqlite_autoincrement=True,
)

sagas = Table(
    "sagas",
    metadata,
    Column("sequence", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("subject_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("step", Text, nullable=False),
    Column("unwind_requested", Boolean, nullable=False),
    Column("inputs", JSON, nullable=False),
    Column("outputs", JSON, nullable=False),
    Column("failure", JSON, nullable=False),
    Column("error", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("recoveries", Integer, nullable=False, server_default="0"),
    Index("sagas_by_subject", "subject_id"),
    sqlite_autoincrement=True,
)

outbox = Table(
    "outbox",
    metadata,
    # Clients resume from these ids, so none is ever used twice.
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("kind", Text, nullable=False),
    Column("sandbox_id", Text),
    Column("payload", JSON, nullable=False),
    # Whose the sandbox was then: it may be gone when somebody reads of it.
    Column("owner_id", Text, nullable=False, server_default=""),
    sqlite_autoincrement=True,
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("sequence", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("name", Text, nullable=False, unique=True),
    Column("host_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("sandbox_id", Text, nullable=False),
    Column("sandbox_name", Text, nullable=False),
    Column("parent_id", Text),
    # The snapshot over whose disk this one's stands.
    Column("base_id", Text),
    Column("keep_last", Integer),
    Column("image", Text, nullable=False),
    Column("image_id", Text, nullable=False),
    Column("vcpu_count", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("file_system_mib", Integer, nullable=False),
    Column("environment", JSON, nullable=False),
    Column("labels", JSON, nullable=False),
    # MachineRecord.to_json.
    Column("machine", JSON, nullable=False),
    # By file: what its bytes came to when it was made.
    Column("checksums", JSON, nullable=False),
    # The host's boot in which the large files were last known to be whole.
    Column("boot_id", Text, nullable=False),
    Column("memory_bytes", Integer, nullable=False),
    Column("disk_bytes", Integer, nullable=False),
    Column("stopped_ms", Float, nullable=False),
    Column("template_key", Text, nullable=False),
    Column("failure_code", Text, nullable=False),
    Column("failure_message", Text, nullable=False),
    Column("failure_hint", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("owner_id", Text, nullable=False, server_default=""),
    Index("snapshots_by_template", "template_key"),
    sqlite_autoincrement=True,
)

warm_pools = Table(
    "warm_pools",
    metadata,
    Column("image", Text, primary_key=True),
    Column("vcpu_count", Integer, primary_key=True),
    Column("memory_mib", Integer, primary_key=True),
    # How many sandboxes are to stand ready.
    Column("size", Integer, nullable=False),
)

settings = Table(
    "settings",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

users = Table(
    "users",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    # Lower case; null for the local admin.
    Column("email", Text, unique=True),
    Column("role", Text, nullable=False),
    Column("is_disabled", Boolean, nullable=False),
    Column("is_local", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

# Who a provider says that a user is.
identities = Table(
    "identities",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    # SHA-256 of what stands behind the prefix, in hexadecimal digits.
    Column("hash", Text, nullable=False, unique=True),
    Column("hint", Text, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("is_local", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Index("api_keys_by_user", "user_id"),
)

browser_sessions = Table(
    "browser_sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),
    Column("provider", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Index("browser_sessions_by_user", "user_id"),
)

ssh_keys = Table(
    "ssh_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    # Base64.
    Column("blob", Text, nullable=False),
    Column("comment", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("user_id", "blob"),
    Index("ssh_keys_by_blob", "blob"),
)

# Rows stay for as long as there are events of their sandbox, which may be gone.
sandbox_shares = Table(
    "sandbox_shares",
    metadata,
    Column("sandbox_id", Text, primary_key=True),
    Column("user_id", Text, primary_key=True),
    Index("sandbox_shares_by_user", "user_id"),
)

# Who may visit ports of sandboxes; those without a row are private. Rows of sandboxes that are gone are trimmed.
preview_ports = Table(
    "preview_ports",
    metadata,
    Column("sandbox_id", Text, primary_key=True),
    Column("port", Integer, primary_key=True),
    Column("visibility", Text, nullable=False),
    # Of the links that are good.
    Column("generation", Integer, nullable=False),
)

audit_entries = Table(
    "audit_entries",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("user_name", Text, nullable=False),
    Column("through", Text, nullable=False),
    Column("operation", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("address", Text, nullable=False),
    sqlite_autoincrement=True,
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    # Of operation, path and body.
    Column("request_hash", Text, nullable=False),
    # Ids of what was made; null: it was begun, and nobody has said yet how it ended.
    Column("made", JSON(none_as_null=True)),
    Column("created_at", UtcDateTime, nullable=False),
)
