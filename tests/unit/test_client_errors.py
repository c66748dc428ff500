"""From what the API answers to the error tree."""

from __future__ import annotations

import pytest

from atelier.client.errors import error_from_body, error_from_response
from atelier.model import errors
from atelier.schemas.errors import ErrorBody


def subclasses(kind: type[errors.AtelierError]) -> list[type[errors.AtelierError]]:
    return [
        kind,
        *(each for child in kind.__subclasses__() if child.__module__ == errors.__name__ for each in subclasses(child)),
    ]


@pytest.mark.parametrize("kind", subclasses(errors.AtelierError), ids=lambda kind: kind.__name__)
def test_every_code_of_the_tree_comes_back_as_its_class(kind: type[errors.AtelierError]) -> None:
    found = error_from_body(ErrorBody(code=kind.default_code, message="m", hint="h"), 500)
    assert type(found) is kind
    assert (found.code, found.message, found.hint) == (kind.default_code, "m", "h")


@pytest.mark.parametrize("kind", subclasses(errors.AtelierError), ids=lambda kind: kind.__name__)
def test_narrower_codes_fall_back_on_the_status_that_the_api_gives_their_class(kind: type[errors.AtelierError]) -> None:
    from atelier.api.errors import status_of

    status = status_of(kind("m"))
    found = error_from_body(ErrorBody(code="some_narrower_code", message="m"), status)
    assert found.code == "some_narrower_code"
    # A status stands for several classes; what must not get lost is whether trying again makes sense, and the blame.
    if issubclass(
        kind, errors.NotFoundError | errors.AuthenticationError | errors.AccessDeniedError | errors.InvalidRequestError
    ):
        assert type(found) is kind
    if issubclass(kind, errors.TransientError):
        assert isinstance(found, errors.TransientError)


def test_codes_in_streams_have_no_status_and_are_told_by_their_form() -> None:
    assert isinstance(error_from_body(ErrorBody(code="sandbox_not_found", message="m")), errors.NotFoundError)
    assert isinstance(error_from_body(ErrorBody(code="invalid_thing", message="m")), errors.InvalidRequestError)
    assert type(error_from_body(ErrorBody(code="never_heard_of", message="m"))) is errors.AtelierError


def test_an_answer_that_is_not_the_managers_is_said_so() -> None:
    found = error_from_response(502, b"<html>bad gateway</html>", "list the sandboxes")
    assert found.code == "unexpected_answer"
    assert "bad gateway" in found.message
    assert "ATELIER_API_URL" in found.hint
    assert len(error_from_response(500, b"x" * 10_000_000, "do it").message) < 1000
