"""Who may visit which port of a sandbox.

A migration is history: it spells its columns out and never imports ``atelier.db.tables``.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "preview_ports",
        sa.Column("sandbox_id", sa.Text, primary_key=True),
        sa.Column("port", sa.Integer, primary_key=True),
        sa.Column("visibility", sa.Text, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
    )
