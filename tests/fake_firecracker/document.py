"""The vendor's API document: which requests and answers it knows. Never copied into this repository; its path comes from
``ATELIER_FIRECRACKER_API_SPEC``, else it lies beside the checkout.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft4Validator

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Of libyaml where that is there: ten times faster."""
_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "firecracker-api.yaml"


def find_document() -> Path | None:
    if given := os.environ.get("ATELIER_FIRECRACKER_API_SPEC"):
        return Path(given)
    return _BESIDE if _BESIDE.exists() else None


NO_DOCUMENT = "" if find_document() else "no API document of Firecracker's: set ATELIER_FIRECRACKER_API_SPEC"
"""As words for a skip; empty where there is one."""


class Breach(Exception):
    """What the document does not allow."""


class ApiDocument:
    """Swagger 2.0. All objects are closed: a name that the document does not know is a breach, as Firecracker refuses
    it."""

    def __init__(self, path: Path) -> None:
        self.content: dict[str, Any] = yaml.load(path.read_text(), _LOADER)
        self._definitions = {name: _closed(each) for name, each in self.content["definitions"].items()}
        self._paths = {
            re.compile(re.sub(r"\{[^}]+\}", "[A-Za-z0-9_]+", path)): operations
            for path, operations in self.content["paths"].items()
        }

    def operation(self, method: str, path: str) -> dict[str, Any]:
        for pattern, operations in self._paths.items():
            if pattern.fullmatch(path) and method.lower() in operations:
                return operations[method.lower()]
        raise Breach(f"there is no {method} {path}")

    def check_request(self, method: str, path: str, body: Any) -> None:
        expected = [each for each in self.operation(method, path).get("parameters", ()) if each["in"] == "body"]
        if not expected:
            if body is not None:
                raise Breach(f"{method} {path} takes no body")
            return
        if body is None:
            if expected[0].get("required"):
                raise Breach(f"{method} {path} needs a body")
            return
        self._check(expected[0]["schema"], body, f"{method} {path}")

    def check_answer(self, method: str, path: str, status: int, body: Any) -> None:
        responses = self.operation(method, path)["responses"]
        response = responses.get(status) or responses.get(str(status)) or responses["default"]
        if "schema" in response:
            self._check(response["schema"], body, f"the answer {status} to {method} {path}")
        elif body is not None:
            raise Breach(f"the answer {status} to {method} {path} has no body")

    def _check(self, schema: dict[str, Any], value: Any, what: str) -> None:
        whole = {**_closed(schema), "definitions": self._definitions}
        for error in Draft4Validator(whole).iter_errors(value):
            place = "/".join(str(part) for part in error.absolute_path)
            raise Breach(f"{what}: {place or 'it'}: {error.message}")


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    # Beside a reference nothing counts. Source: JSON Reference; Swagger 2.0.
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    closed = {name: _closed(each) for name, each in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed
