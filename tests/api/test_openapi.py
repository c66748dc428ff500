"""The checked-in description of the API is the one that the routes give, and every route has an id."""

from __future__ import annotations

import json
from pathlib import Path

from atelier.api.application import describe_api

DOCUMENT = Path(__file__).resolve().parents[2] / "openapi" / "manager.json"


def test_the_checked_in_document_is_current() -> None:
    assert json.loads(DOCUMENT.read_text()) == json.loads(json.dumps(describe_api().openapi())), "run scripts/openapi"


def test_every_operation_has_an_id_of_its_own() -> None:
    ids = [
        operation["operationId"]
        for operations in describe_api().openapi()["paths"].values()
        for operation in operations.values()
    ]
    assert len(ids) == len(set(ids)) > 20
    assert all(operation_id.replace("_", "").isalpha() and operation_id.islower() for operation_id in ids)
