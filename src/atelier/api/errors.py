"""The one table from error code to HTTP status, and the one form in which errors are answered."""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.websockets import WebSocket

from atelier.model import errors
from atelier.schemas.errors import ErrorBody

logger = logging.getLogger(__name__)

_STATUS_BY_CLASS: tuple[tuple[type[errors.AtelierError], int], ...] = (
    # The first class that fits counts, so children stand before their parents.
    (errors.InvalidRequestError, 422),
    (errors.AuthenticationError, 401),
    (errors.AccessDeniedError, 403),
    (errors.RateLimitedError, 429),
    (errors.NotFoundError, 404),
    (errors.ConflictError, 409),
    (errors.PreconditionError, 409),
    (errors.CapacityError, 503),
    (errors.DiskFullError, 507),
    (errors.MissingProgramError, 503),
    (errors.MissingPackageError, 503),
    (errors.GuestProtocolError, 502),
    (errors.GuestError, 502),
    (errors.GuestUnreachableError, 503),
    (errors.TimeoutExceededError, 504),
    (errors.TransientError, 503),
    (errors.AtelierError, 500),
)

_STATUS_BY_CODE = {
    "body_too_large": 413,
    "range_not_satisfiable": 416,
    # Whatever class it comes in: a snapshot's failure is told on by its code.
    "disk_full": 507,
    "quiesce_failed": 502,
    "guest_unreachable": 503,
    "sandbox_destroyed": 409,
    "disk_chain_too_long": 409,
}
"""Where HTTP has a more exact word than the class."""

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 416: "range_not_satisfiable"}


def status_of(error: errors.AtelierError) -> int:
    return _STATUS_BY_CODE.get(error.code) or next(
        status for kind, status in _STATUS_BY_CLASS if isinstance(error, kind)
    )


def body_of(error: errors.AtelierError) -> ErrorBody:
    return ErrorBody(code=error.code, message=error.message, hint=error.hint)


def respond(status: int, body: ErrorBody) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def answer(error: errors.AtelierError) -> JSONResponse:
    response = respond(status_of(error), body_of(error))
    if isinstance(error, errors.RateLimitedError):
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_seconds))
    return response


def install(app: FastAPI) -> None:
    """Make ``app`` answer every error in the one form."""

    async def on_atelier_error(connection: HTTPConnection, error: Exception) -> JSONResponse:
        assert isinstance(error, errors.AtelierError)
        response = answer(error)
        if isinstance(connection, WebSocket):
            await connection.send_denial_response(response)
        return response

    async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return respond(422, _describe(error))

    async def on_http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = _HTTP_CODES.get(error.status_code, "http_error")
        hint = "see the list of routes at /docs" if error.status_code in (404, 405) else ""
        response = respond(error.status_code, ErrorBody(code=code, message=str(error.detail), hint=hint))
        response.headers.update(error.headers or {})
        return response

    async def on_disconnect(_: Request, __: Exception) -> JSONResponse:
        # Nobody reads this answer; the handler was unwound, which is what matters.
        return respond(400, ErrorBody(code="client_disconnected", message="the client went away"))

    async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return respond(
            500,
            ErrorBody(
                code="internal",
                message="the manager met an error of its own",
                hint="the manager's log has the details; please report them",
            ),
        )

    app.add_exception_handler(errors.AtelierError, on_atelier_error)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_unexpected)


def _describe(error: RequestValidationError) -> ErrorBody:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return ErrorBody(
        code="invalid_request",
        # Names of fields are the sender's, as long as they like.
        message=f"{place[:200]}: {first['msg']}",
        hint="the expected form is at /docs",
    )
