"""What running machines are made of, the memory of paused sandboxes, snapshots, and warm pools.

A migration is history: it spells its columns out and never imports ``atelier.db.tables``.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("machine", sa.JSON))
    op.add_column("sandboxes", sa.Column("snapshot_id", sa.Text))
    op.add_column("sandboxes", sa.Column("disk_only", sa.Boolean, nullable=False, server_default="0"))
    op.add_column("sandboxes", sa.Column("purpose", sa.Text, nullable=False, server_default="user"))
    op.add_column("sandboxes", sa.Column("saved_memory", sa.JSON))
    op.create_table(
        "snapshots",
        sa.Column("sequence", sa.Integer, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("host_id", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("sandbox_id", sa.Text, nullable=False),
        sa.Column("sandbox_name", sa.Text, nullable=False),
        sa.Column("parent_id", sa.Text),
        sa.Column("base_id", sa.Text),
        sa.Column("keep_last", sa.Integer),
        sa.Column("image", sa.Text, nullable=False),
        sa.Column("image_id", sa.Text, nullable=False),
        sa.Column("vcpu_count", sa.Integer, nullable=False),
        sa.Column("memory_mib", sa.Integer, nullable=False),
        sa.Column("disk_mib", sa.Integer, nullable=False),
        sa.Column("file_system_mib", sa.Integer, nullable=False),
        sa.Column("environment", sa.JSON, nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("machine", sa.JSON, nullable=False),
        sa.Column("checksums", sa.JSON, nullable=False),
        sa.Column("boot_id", sa.Text, nullable=False),
        sa.Column("memory_bytes", sa.Integer, nullable=False),
        sa.Column("disk_bytes", sa.Integer, nullable=False),
        sa.Column("stopped_ms", sa.Float, nullable=False),
        sa.Column("template_key", sa.Text, nullable=False),
        sa.Column("failure_code", sa.Text, nullable=False),
        sa.Column("failure_message", sa.Text, nullable=False),
        sa.Column("failure_hint", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("updated_at", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("snapshots_by_template", "snapshots", ["template_key"])
    op.create_table(
        "warm_pools",
        sa.Column("image", sa.Text, primary_key=True),
        sa.Column("vcpu_count", sa.Integer, primary_key=True),
        sa.Column("memory_mib", sa.Integer, primary_key=True),
        sa.Column("size", sa.Integer, nullable=False),
    )
