"""Where the API's document lets a value stand: in paths, queries, headers and, level by level, in bodies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


class Bodies:
    """``sample`` is the least that an operation takes; ``with_value`` every body with one value of it replaced."""

    def __init__(self, document: Schema) -> None:
        self._named: Schema = document["components"]["schemas"]

    def _resolve(self, schema: Schema) -> Schema:
        if "$ref" in schema:
            return self._resolve(self._named[schema["$ref"].rpartition("/")[2]])
        for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            if choice.get("type") != "null":
                return self._resolve(choice)
        return schema

    def sample(self, schema: Schema, *, whole: bool = False) -> Any:
        """``whole``: with all that may be left out."""
        schema = self._resolve(schema)
        if "enum" in schema:
            return schema["enum"][0]
        if "const" in schema:
            return schema["const"]
        match schema.get("type"):
            case "object" if "properties" in schema:
                names = schema["properties"] if whole else schema.get("required", ())
                return {name: self.sample(schema["properties"][name], whole=whole) for name in names}
            case "object":
                (values,) = schema.get("patternProperties", {"": schema.get("additionalProperties")}).values()
                return {"a": self.sample(values)} if whole else {}
            case "array":
                return [self.sample(schema["items"], whole=whole)]
            case "integer" | "number":
                return schema.get("minimum", 1)
            case "boolean":
                return False
            case _:
                return "2999-01-01T00:00:00Z" if schema.get("format") == "date-time" else "x"

    def with_value(self, schema: Schema, value: Any) -> Iterator[tuple[str, Any]]:
        """(place, body): the whole sample with ``value`` in place of each of its values and of its keys, once each."""
        sample = self.sample(schema, whole=True)
        yield "body", value
        for place in list(_places(sample)):
            changed = copy.deepcopy(sample)
            parent = changed
            for step in place[:-1]:
                parent = parent[step]
            parent[place[-1]] = value
            yield ".".join(map(str, place)), changed
            if isinstance(value, str) and isinstance(place[-1], str):
                parent[value] = parent.pop(place[-1])
                yield f"the key of {'.'.join(map(str, place))}", changed


def _places(sample: Any) -> Iterator[tuple[str | int, ...]]:
    entries = sample.items() if isinstance(sample, dict) else enumerate(sample) if isinstance(sample, list) else ()
    for key, value in entries:
        yield (key,)
        for below in _places(value):
            yield (key, *below)
