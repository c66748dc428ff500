"""The audit log, for admins."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request

from atelier.api.parameters import services_of
from atelier.schemas.accounts import AuditEntry, AuditPage

router = APIRouter(tags=["audit"])


@router.get("/audit", operation_id="list_audit_entries")
async def list_audit_entries(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=0, le=2**63 - 1, description="`next_before` of the page before")] = None,
    user: Annotated[str, Query(max_length=64, description="only this user's (their id)")] = "",
    operation: Annotated[str, Query(max_length=64, description="only of this operation")] = "",
) -> AuditPage:
    """Who did what, when and from where, newest first. What only looks is not written down. Kept for 90 days."""
    found = await services_of(request).audit.list_page(limit, before, user, operation)
    return AuditPage(
        items=[AuditEntry(**asdict(each)) for each in found],
        next_before=found[-1].id if len(found) == limit else None,
    )
