"""``atelier extend``."""

from __future__ import annotations

import click

from atelier.cli.invocation import (
    DURATION_OR_NEVER,
    NEVER,
    Invocation,
    json_option,
    pass_invocation,
    sandbox_argument,
)


@click.command(short_help="Change how long a sandbox lives.")
@sandbox_argument
@click.argument("duration", required=False, type=DURATION_OR_NEVER)
@click.option(
    "--stop-when-idle", "idle", type=DURATION_OR_NEVER, help="Stop it when nobody has used it for so long, or never."
)
@json_option("Print the sandbox as JSON.")
@pass_invocation
def extend(
    invocation: Invocation, sandbox: str, duration: int | str | None, idle: int | str | None, as_json: bool
) -> None:
    """Have SANDBOX destroyed DURATION from now (90s, 30m, 2h, 1d, 1h30m), and not before; or never.

    The time counts from now, not from an expiry that was set before.

    \b
    Examples:
      atelier extend box 2h
      atelier extend box never
      atelier extend box --stop-when-idle 30m
    """
    from atelier.cli.describing import show_limits
    from atelier.cli.output import print_line, print_model, printable
    from atelier.client.call import KEEP
    from atelier.client.sandbox import Sandbox

    if duration is None and idle is None:
        raise click.UsageError("Say how long: `atelier extend box 2h`, or never.")
    with invocation.connect() as connection:
        found = Sandbox.connect(sandbox, connection=connection).set_time_limits(
            expires_at=None if duration == NEVER else KEEP,
            expires_in_seconds=duration if isinstance(duration, int) else None,
            auto_stop_after_idle_seconds=idle if isinstance(idle, int) else None if idle == NEVER else KEEP,
        )
    if as_json:
        print_model(found)
    else:
        print_line(f"{printable(found.name)}  {show_limits(found) or 'no time limits'}")
