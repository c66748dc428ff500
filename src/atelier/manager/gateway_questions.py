"""The socket on which the gateway asks the manager who may enter. Opened by ``installation`` where there is a gateway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from atelier.host.line_server import Answer, LineServer, Request
from atelier.model.errors import InvalidRequestError
from atelier.model.layout import RunLayout

Answering = Callable[[Request], Awaitable[Answer]]


class GatewayQuestions(LineServer):
    """``answers``: who answers operations whose names begin so."""

    def __init__(self, run: RunLayout, answers: Mapping[str, Answering]) -> None:
        super().__init__(run.manager_socket, self._answer_one)
        self._answers = answers

    async def _answer_one(self, request: Request, asker: int) -> Answer:
        del asker
        prefix = str(request.get("operation", "")).partition("_")[0]
        answer = self._answers.get(prefix)
        if answer is None:
            raise InvalidRequestError(f"unknown operation: the manager answers those of {', '.join(self._answers)}")
        return await answer(request)


def text_of(request: Request, name: str, max_length: int) -> str:
    """Raises InvalidRequestError."""
    value = request.get(name)
    if not isinstance(value, str) or len(value) > max_length:
        raise InvalidRequestError(f"{name} is missing, or is no text")
    return value
