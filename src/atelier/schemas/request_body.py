"""What all bodies have in common that are sent to the manager."""

from __future__ import annotations

from typing import cast

from pydantic import BaseModel, ConfigDict, model_validator


class RequestBody(BaseModel):
    """A field that nobody knows is refused, as is text that is no Unicode: JSON can escape half a surrogate pair, which no
    database, guest or answer can take."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_lone_surrogates(cls, sent: object) -> object:
        left = [sent]
        while left:
            value = left.pop()
            if isinstance(value, str):
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise ValueError("half a surrogate pair stands in it, which is no Unicode text") from None
            elif isinstance(value, dict):
                fields = cast("dict[object, object]", value)
                left += [*fields, *fields.values()]
            elif isinstance(value, list):
                left += cast("list[object]", value)
        return sent
