"""The one error of this room: a setting that cannot be. ``settings`` says where a value came from."""

from __future__ import annotations

from atelier.model.errors import InvalidRequestError


class InvalidSettingError(InvalidRequestError):
    """``variable`` bears a value that cannot be; ``hint`` says what it may bear."""

    default_code = "invalid_setting"

    def __init__(self, variable: str, value: str, *, hint: str, message: str = "") -> None:
        super().__init__(message or f"{variable} is {value!r}", hint=hint)
        self.variable = variable
        self.value = value
