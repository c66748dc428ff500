"""The header ``Idempotency-Key``: a request that is sent twice, as after a broken connection, is done once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import BaseModel

from atelier.api.authorisation import Caller
from atelier.api.parameters import services_of


class _Once:
    def __init__(
        self,
        request: Request,
        caller: Caller,
        idempotency_key: Annotated[
            str | None,
            Header(
                min_length=1,
                max_length=200,
                description="for 24 hours, the same key with the same body makes nothing new: the answer shows what the "
                "first request has made. With another body: 422 `idempotency_key_reused`",
            ),
        ] = None,
    ) -> None:
        self._request, self._caller, self._key = request, caller, idempotency_key

    async def __call__(self, body: BaseModel, make: Callable[[], Awaitable[list[str]]]) -> list[str]:
        """Ids of what ``make`` made, now or when the key was sent first. Raises what ``IdempotencyService.once``
        raises."""
        if self._key is None:
            return await make()
        request = f"{self._request.method} {self._request.url.path} {body.model_dump_json()}"
        return await services_of(self._request).idempotency.once(self._caller.user_id, self._key, request, make)


Once = Annotated[_Once, Depends()]
