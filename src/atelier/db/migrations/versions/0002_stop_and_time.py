"""Stopped sandboxes, time limits, network leases, and how often a saga was resumed.

A migration is history: it spells its columns out and never imports ``atelier.db.tables``.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("stop_reason", sa.Text, nullable=False, server_default=""))
    op.add_column("sandboxes", sa.Column("file_system_mib", sa.Integer, nullable=False, server_default="0"))
    op.add_column("sandboxes", sa.Column("auto_stop_after_idle_seconds", sa.Integer))
    op.add_column("sandboxes", sa.Column("expires_at", sa.Text))
    op.add_column("sandboxes", sa.Column("last_active_at", sa.Text))
    op.add_column("sandboxes", sa.Column("network_lease", sa.Integer))
    op.create_index("sandboxes_by_lease", "sandboxes", ["host_id", "network_lease"], unique=True)
    op.add_column("sagas", sa.Column("recoveries", sa.Integer, nullable=False, server_default="0"))
