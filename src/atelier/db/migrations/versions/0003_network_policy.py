"""Network policies: what a sandbox may reach, whether that is in force yet, and the addresses of its slot.

A migration is history: it spells its columns out and never imports ``atelier.db.tables``.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("network_address", sa.Text))
    op.add_column("sandboxes", sa.Column("network_gateway", sa.Text))
    op.add_column("sandboxes", sa.Column("network_pending", sa.Boolean, nullable=False, server_default="0"))
    op.add_column("sandboxes", sa.Column("network_policy", sa.JSON))
