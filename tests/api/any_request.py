"""What Schemathesis makes of the checked-in document: requests as it allows them, and as it does not. Whatever is asked, the
answer is one that the document describes, and never an error of the manager's own.

``ATELIER_FUZZ_EXAMPLES``: how many requests per operation, beside those at the bounds of what is allowed (default 12).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from schemathesis import Case
from schemathesis.config import SchemathesisConfig
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks
from tests.api.described_api import DOCUMENT, SECONDS, DescribedApi, described_api, ends_the_manager

from atelier.api.streams import NDJSON

CONFIG = SchemathesisConfig.from_dict({
    "seed": 1,
    "generation": {
        "max-examples": int(os.environ.get("ATELIER_FUZZ_EXAMPLES", "12")),
        "deterministic": True,
        "database": "none",
        "no-shrink": True,
    },
})  # fmt: skip
schema = schemathesis.openapi.from_dict(json.loads(DOCUMENT.read_text()), config=CONFIG)
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def stage() -> Iterator[DescribedApi]:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder, described_api(Path(folder)) as opened:
        yield opened


@schema.parametrize()
def test_any_request(case: Case, stage: DescribedApi) -> None:
    if case.method == "POST" and ends_the_manager(case.operation.definition.raw["operationId"], case.body):
        return
    stage.renew(case.operation.path)
    place(case, stage.names)
    ask(case, stage)


def place(case: Case, names: dict[str, str]) -> None:
    """What the path names exists, unless it is the path that is wrong; nothing is waited for longer than ``SECONDS``,
    and nothing is made by the thousand."""
    assert case.meta is not None
    path = case.meta.components.get(ParameterLocation.PATH)
    if path is not None and path.mode is GenerationMode.POSITIVE:
        for name in case.path_parameters:
            case.path_parameters[name] = names[name]
    for sent, most in ((case.query, {"timeout_seconds": SECONDS}), (case.body, {"count": 3, "size": 3})):
        if isinstance(sent, dict):
            for name, limit in most.items():
                value = sent.get(name)
                if isinstance(value, int | float):
                    sent[name] = min(value, limit)


def ask(case: Case, stage: DescribedApi) -> None:
    kwargs = case.as_transport_kwargs(base_url=stage.manager.url)
    with stage.session.request(**kwargs, stream=True, timeout=30) as answer:
        if answer.headers.get("Content-Type", "").startswith(("text/event-stream", NDJSON)):
            # Streams may go on for ever; they are read as far as they come at once.
            answer._content = next(answer.iter_content(65536), b"")
        else:
            _ = answer.content
    assert answer.status_code != 500, answer.text
    case.validate_response(answer, checks=CHECKS)
