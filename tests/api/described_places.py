"""Where the API's document lets a value stand: in paths, queries, headers and, level by level, in bodies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Schema = dict[str, Any]
Place = tuple[str | int, ...]


class Bodies:
    """``sample`` is the least that an operation takes; ``with_values`` every body with one value of it replaced."""

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

    def with_values(self, schema: Schema, values: Callable[[Any], Iterable[Any]]) -> Iterator[tuple[str, Any, Any]]:
        """(place, value, body): what an operation takes at least, with one more field at most, in which one value is
        replaced by each of ``values``, which is told what stands there; and keys of texts by those for texts."""
        least, whole = self.sample(schema), self.sample(schema, whole=True)
        for value in values(whole):
            yield "body", value, value
        for name, field in whole.items():
            body = {**least, name: field}
            for place, present in _places(body):
                if place[0] == name:
                    yield from _with_values(body, place, present, values)


def _with_values(
    body: Any, place: Place, present: Any, values: Callable[[Any], Iterable[Any]]
) -> Iterator[tuple[str, Any, Any]]:
    said = ".".join(map(str, place))
    for value in values(present):
        changed, parent = _copied(body, place)
        parent[place[-1]] = value
        yield said, value, changed
        if isinstance(value, str) and isinstance(present, str) and isinstance(place[-1], str):
            changed, parent = _copied(body, place)
            parent[value] = parent.pop(place[-1])
            yield f"the key of {said}", value, changed


def _copied(sample: Any, place: Place) -> tuple[Any, Any]:
    """(a copy, what holds ``place`` in it)"""
    copied = copy.deepcopy(sample)
    parent = copied
    for step in place[:-1]:
        parent = parent[step]
    return copied, parent


def _places(sample: Any) -> Iterator[tuple[Place, Any]]:
    entries = sample.items() if isinstance(sample, dict) else enumerate(sample) if isinstance(sample, list) else ()
    for key, value in entries:
        yield (key,), value
        for below, deeper in _places(value):
            yield (key, *below), deeper
