"""From the API's ``{code, message, hint}`` and from broken connections to the error tree of ``model.errors``.

Called wherever an answer is read. The code decides; a narrower code (``sandbox_not_found``) falls back on the HTTP
status, then on the form of the code, so that an older client understands a newer manager.
"""

from __future__ import annotations

import httpx
from pydantic import ValidationError

from atelier.model import errors as tree
from atelier.model.errors import (
    AccessDeniedError,
    AtelierError,
    AuthenticationError,
    CapacityError,
    ConflictError,
    DiskFullError,
    GuestError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    TimeoutExceededError,
    TransientError,
)
from atelier.schemas.errors import ErrorBody

_ERROR_BODY_MAX_BYTES = 256 * 1024
_EXCERPT_CHARACTERS = 200


def _by_default_code() -> dict[str, type[AtelierError]]:
    classes = [value for value in vars(tree).values() if isinstance(value, type) and issubclass(value, AtelierError)]
    return {each.default_code: each for each in classes}


_BY_CODE = _by_default_code()

_BY_STATUS: dict[int, type[AtelierError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: AccessDeniedError,
    404: NotFoundError,
    405: InvalidRequestError,
    409: ConflictError,
    412: PreconditionError,
    413: InvalidRequestError,
    416: InvalidRequestError,
    422: InvalidRequestError,
    429: CapacityError,
    502: GuestError,
    503: TransientError,
    504: TimeoutExceededError,
    507: DiskFullError,
}

_BY_FORM: tuple[tuple[str, type[AtelierError]], ...] = (
    ("_not_found", NotFoundError),
    ("_exists", ConflictError),
    ("_taken", ConflictError),
    ("_timeout", TimeoutExceededError),
    ("_unreachable", TransientError),
)


def error_from_body(body: ErrorBody, status: int | None = None) -> AtelierError:
    """The error that stands for ``body``, with its code, message and hint."""
    found = _BY_CODE.get(body.code) or (_BY_STATUS.get(status) if status is not None else None)
    if found is None and body.code.startswith("invalid_"):
        found = InvalidRequestError
    if found is None:
        found = next((kind for ending, kind in _BY_FORM if body.code.endswith(ending)), AtelierError)
    return found(body.message, hint=body.hint, code=body.code)


def error_from_response(status: int, content: bytes, operation: str) -> AtelierError:
    """The error that an answer with a status of 400 or above stands for."""
    try:
        return error_from_body(ErrorBody.model_validate_json(content[:_ERROR_BODY_MAX_BYTES]), status)
    except ValidationError:
        excerpt = content[:_EXCERPT_CHARACTERS].decode("utf-8", "replace").strip()
        kind = _BY_STATUS.get(status, AtelierError)
        return kind(
            f"could not {operation}: HTTP status {status}, not in the manager's form"
            + (f": {excerpt}" if excerpt else ""),
            code="unexpected_answer",
            hint="check that ATELIER_API_URL leads to an Atelier manager and not to something else",
        )


def error_from_transport(error: httpx.HTTPError, api_url: str, operation: str) -> AtelierError:
    """The error for a request that got no answer, or only a part of one."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return manager_unreachable(api_url, operation, reason)
    if isinstance(error, httpx.TimeoutException):
        return TimeoutExceededError(
            f"could not {operation}: the manager at {api_url} did not answer in time",
            code="manager_timeout",
            hint="try again; `atelier doctor` shows whether the machine is well",
        )
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return InvalidRequestError(f"could not {operation}: {reason}", hint="check ATELIER_API_URL")
    return TransientError(
        f"could not {operation}: the connection to {api_url} broke off ({reason})",
        code="connection_lost",
        hint="what was under way may or may not have happened; look, then try again",
    )


def manager_unreachable(api_url: str, operation: str, reason: str) -> TransientError:
    return TransientError(
        f"could not {operation}: no manager answers at {api_url} ({reason})",
        code="manager_unreachable",
        hint="start it with `atelier up`, or set ATELIER_API_URL to where it runs",
    )


def not_understood(operation: str, error: ValidationError | ValueError) -> AtelierError:
    """The manager answered with something that this version of the client cannot read."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return AtelierError(
        f"could not {operation}: the manager's answer was not understood ({first})",
        code="unexpected_answer",
        hint="compare the versions of both sides with `atelier version`",
    )


def invalid_arguments(operation: str, error: ValidationError) -> InvalidRequestError:
    """The caller's values break the contract; said before anything is sent."""
    problems = [
        f"{'.'.join(str(part) for part in each['loc']) or 'value'}: {each['msg'][:1].lower()}{each['msg'][1:]}"
        for each in error.errors(include_url=False, include_context=False)[:5]
    ]
    return InvalidRequestError(f"could not {operation}: {'; '.join(problems)}", hint="correct the named values")
