"""What every command shares: which manager is meant, and the options that all of them know."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from atelier.cli.lazy_group import JSON_OUTPUT

if TYPE_CHECKING:
    from atelier.client.connection import Connection
    from atelier.client.environment import Endpoint

    PairParameter = click.ParamType[tuple[str, str]]
    SizeParameter = click.ParamType[int]
    DurationParameter = click.ParamType[int | str]
    RateParameter = click.ParamType[int | str]
else:
    # Older versions of click have no type argument here.
    PairParameter = SizeParameter = DurationParameter = RateParameter = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Invocation:
    """The options before the command. Empty ones leave the choice to the environment."""

    api_url: str = ""
    data_dir: str = ""

    def endpoint(self) -> Endpoint:
        """Raises AuthenticationError (``no_api_key``) when no manager is known."""
        from atelier.client.environment import find_endpoint
        from atelier.config.file import find_data_dir

        return find_endpoint(api_url=self.api_url, data_dir=self.data_dir or find_data_dir())

    def connect(self) -> Connection:
        from atelier.client.connection import Connection

        return Connection(self.endpoint())


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


def json_option(what: str) -> Callable[[F], F]:
    """``--json``: tells the command (parameter ``as_json``) and the printing of errors."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        ctx.meta[JSON_OUTPUT] = value
        return value

    return click.option("--json", "as_json", is_flag=True, callback=remember, is_eager=True, help=what)


def complete_sandbox(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of sandboxes for the shell's completion; silent when the manager cannot be asked."""
    from atelier.model.errors import AtelierError

    root = ctx.find_root().params
    try:
        with Invocation(root.get("api_url") or "", root.get("data_dir") or "").connect() as connection:
            return _names(connection, incomplete)
    except AtelierError:
        return []


def _names(connection: Connection, incomplete: str) -> list[str]:
    import dataclasses

    from atelier.client import calls

    call = dataclasses.replace(calls.list_sandboxes(limit=200), read_timeout_seconds=2.0, repeatable=False)
    return [each.name for each in connection.send(call).items if each.name.startswith(incomplete)]


def sandboxes_argument(function: F) -> F:
    """Several sandboxes: the tuple ``sandboxes``."""
    return click.argument("sandboxes", metavar="SANDBOX...", nargs=-1, required=True, shell_complete=complete_sandbox)(
        function
    )


def waiting_options(function: F) -> F:
    """``--no-wait`` and ``--timeout``, for commands that wait for a sandbox."""
    function = click.option(
        "--timeout", "timeout_seconds", type=click.FloatRange(min=1), default=300.0, show_default=True,
        metavar="SECONDS", help="How long to wait for it.",
    )(function)  # fmt: skip
    return click.option("--no-wait", is_flag=True, help="Return as soon as the manager has taken the order.")(function)


grace_option = click.option(
    "--grace", "grace_seconds", type=click.FloatRange(min=0, max=3600), metavar="SECONDS",
    help="How long its guest may take to shut down before it is cut off.  [default: 30]",
)  # fmt: skip


def sandbox_argument(function: F) -> F:
    return click.argument("sandbox", shell_complete=complete_sandbox)(function)


class PairType(PairParameter):
    """``KEY=VALUE``."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]
        key, separator, rest = str(value).partition("=")
        if not separator or not key:
            self.fail(f"{value!r} is not of the form KEY=VALUE", param, ctx)
        return key, rest


class MebibytesType(SizeParameter):
    """A size: ``512`` or ``512M`` are MiB, ``2G`` and ``1.5G`` GiB, ``1T`` TiB."""

    name = "size"
    _FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(M|G|T)(?:i?B)?)?", re.IGNORECASE)
    _FACTORS: ClassVar[dict[str, int]] = {"M": 1, "G": 1024, "T": 1024 * 1024}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = self._FORM.fullmatch(str(value).strip())
        amount = float(found[1]) * self._FACTORS[(found[2] or "M").upper()] if found else 0.5
        if amount != int(amount):
            self.fail(f"{value!r} is no size in whole MiB; write 512, 512M or 2G", param, ctx)
        return int(amount)


class BytesType(SizeParameter):
    """A size in bytes: ``1000``, ``64K``, ``512M``, ``32G``, ``1T``."""

    name = "bytes"
    _FORM = re.compile(r"(\d+)\s*(?:(K|M|G|T)(?:i?B)?)?", re.IGNORECASE)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = self._FORM.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no size; write 1000, 64K, 512M or 32G", param, ctx)
        return int(found[1]) * 1024 ** " KMGT".index((found[2] or " ").upper())


NEVER = "never"


class DurationType(DurationParameter):
    """A duration in seconds: ``90s``, ``30m``, ``2h``, ``1d``, ``1h30m``. Where it takes a limit away, also ``never``,
    which stays a word."""

    name = "duration"
    _FORM = re.compile(r"(?:(\d{1,6})d)?\s*(?:(\d{1,6})h)?\s*(?:(\d{1,6})m)?\s*(?:(\d{1,9})s)?", re.IGNORECASE)

    def __init__(self, *, knows_never: bool = False) -> None:
        self._knows_never = knows_never

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        if self._knows_never and text.lower() == NEVER:
            return NEVER
        found = self._FORM.fullmatch(text)
        factors = (86400, 3600, 60, 1)
        seconds = (
            sum(int(amount or 0) * factor for amount, factor in zip(found.groups(), factors, strict=True))
            if found
            else 0
        )
        if not seconds:
            forms = "90s, 30m, 2h, 1d or 1h30m" + (", or never" if self._knows_never else "")
            self.fail(f"{value!r} is no duration; write {forms}", param, ctx)
        return seconds


UNLIMITED = "none"


class RateType(RateParameter):
    """A network rate in 1,000 bits a second: ``512kbit``, ``10mbit``, ``1.5mbit``, ``1gbit``. Where it lifts a limit, also
    ``none``, which stays a word."""

    name = "rate"
    _FORM = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*(k|m|g)bit(?:/s|ps)?", re.IGNORECASE | re.ASCII)
    _FACTORS: ClassVar[dict[str, int]] = {"k": 1, "m": 1000, "g": 1_000_000}

    def __init__(self, *, knows_none: bool = False) -> None:
        self._knows_none = knows_none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        if self._knows_none and text.lower() == UNLIMITED:
            return UNLIMITED
        found = self._FORM.fullmatch(text)
        # A bare number might mean bits, kilobits or bytes.
        if found is None:
            forms = "512kbit, 10mbit or 1gbit" + (", or none" if self._knows_none else "")
            self.fail(f"{value!r} is no rate; write {forms}", param, ctx)
        return round(float(found[1]) * self._FACTORS[found[2].lower()])


PAIR = PairType()
MEBIBYTES = MebibytesType()
BYTES = BytesType()
DURATION = DurationType()
DURATION_OR_NEVER = DurationType(knows_never=True)
RATE = RateType()
RATE_OR_NONE = RateType(knows_none=True)
