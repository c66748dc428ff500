"""The error tree. Nothing here knows HTTP: ``api/errors.py`` holds the one table from code to status.

::

    AtelierError                     root: code, message, hint
    +-- InvalidRequestError          the caller's words are off (invalid_request)
    +-- AuthenticationError          no token, or a wrong one (unauthenticated)
    +-- AccessDeniedError            known, but not allowed; or a foreign Host or Origin (access_denied)
    +-- RateLimitedError             too many requests, or WebSockets, at once (rate_limited)
    +-- NotFoundError                no such sandbox, image, process or path (not_found)
    +-- ConflictError                name taken, wrong state, saga under way (conflict)
    +-- PreconditionError            the sandbox is not in a state in which this works (not_running)
    +-- CapacityError                the host has not got that much left (insufficient_capacity)
    +-- HostError                    this machine refuses (host_error)
    |   +-- MissingProgramError      a program is not installed (missing_program)
    |   +-- MissingPackageError      a package of others cannot be had (missing_package)
    |   +-- CommandError             a command failed (command_failed)
    |   +-- DiskFullError            no space left (disk_full)
    |   +-- PortInUseError           the listen address is taken (port_in_use)
    |   +-- AlreadyRunningError      another manager holds the data folder (already_running)
    +-- ImageBuildError              an image could not be built (image_build_failed)
    +-- VmmError                     the VMM did not start, died or refused (vmm_failed)
    +-- GuestError                   the guest answered with an error (guest_error)
    |   +-- GuestProtocolError       the guest's bytes break the protocol (guest_protocol_error)
    +-- TransientError               worth trying again (transient)
        +-- GuestUnreachableError    the guest channel does not answer now (guest_unreachable)
        +-- TimeoutExceededError     it did not happen in time (timeout)
        +-- IdentityProviderError    who people sign in with does not answer, or nonsense (identity_provider_failed)

``TransientError`` and its children are the only ones that a saga retries.
"""

from __future__ import annotations

from typing import ClassVar


class AtelierError(Exception):
    """Root of all errors that Atelier raises on purpose.

    ``message`` names the operation and the object; ``hint`` says what to do about it (may be empty).
    ``code`` is stable and machine-readable; each class has a default, and a caller may narrow it
    (``sandbox_not_found`` instead of ``not_found``).
    """

    default_code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidRequestError(AtelierError):
    default_code = "invalid_request"


class AuthenticationError(AtelierError):
    default_code = "unauthenticated"


class AccessDeniedError(AtelierError):
    default_code = "access_denied"


class RateLimitedError(AtelierError):
    """``retry_after_seconds``: when it is worth trying again; on a client's side the message tells."""

    default_code = "rate_limited"

    def __init__(self, message: str, *, hint: str = "", code: str = "", retry_after_seconds: float = 1.0) -> None:
        super().__init__(message, hint=hint, code=code)
        self.retry_after_seconds = retry_after_seconds


class NotFoundError(AtelierError):
    default_code = "not_found"


class ConflictError(AtelierError):
    default_code = "conflict"


class PreconditionError(AtelierError):
    default_code = "not_running"


class CapacityError(AtelierError):
    default_code = "insufficient_capacity"


class HostError(AtelierError):
    default_code = "host_error"


class MissingProgramError(HostError):
    default_code = "missing_program"


class MissingPackageError(HostError):
    default_code = "missing_package"


class CommandError(HostError):
    default_code = "command_failed"


class DiskFullError(HostError):
    default_code = "disk_full"


class PortInUseError(HostError):
    default_code = "port_in_use"


class AlreadyRunningError(HostError):
    default_code = "already_running"


class ImageBuildError(AtelierError):
    default_code = "image_build_failed"


class VmmError(AtelierError):
    default_code = "vmm_failed"


class GuestError(AtelierError):
    default_code = "guest_error"


class GuestProtocolError(GuestError):
    default_code = "guest_protocol_error"


class TransientError(AtelierError):
    default_code = "transient"


class GuestUnreachableError(TransientError):
    default_code = "guest_unreachable"


class TimeoutExceededError(TransientError):
    default_code = "timeout"


class IdentityProviderError(TransientError):
    default_code = "identity_provider_failed"
