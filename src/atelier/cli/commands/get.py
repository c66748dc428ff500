"""``atelier get``."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandbox_argument


@click.command(short_help="Show one sandbox.")
@sandbox_argument
@click.option("--metrics", is_flag=True, help="Also ask its guest for processor, memory and disk use.")
@json_option("Print the sandbox as JSON (with --metrics: {sandbox, metrics}).")
@pass_invocation
def get(invocation: Invocation, sandbox: str, metrics: bool, as_json: bool) -> None:
    """Show the sandbox SANDBOX (a name or an id).

    \b
    Examples:
      atelier get box
      atelier get box --metrics
      atelier get box --json | jq -r .state
    """
    from atelier.cli.describing import (
        CUT_OFF,
        list_trouble,
        show_egress,
        show_expiry,
        show_idle_limit,
        show_last_use,
        show_rates,
        show_state,
    )
    from atelier.cli.output import (
        print_fields,
        print_json,
        print_line,
        print_model,
        printable_block,
        show_age,
        show_bytes,
        show_mebibytes,
    )
    from atelier.client import calls, network_calls
    from atelier.model.states import StopReason

    with invocation.connect() as connection:
        found = connection.send(calls.get_sandbox(sandbox))
        figures = connection.send(calls.get_metrics(found.id)) if metrics else None
        network = None if as_json else connection.send(network_calls.get_network(found.id))
    if as_json and figures is not None:
        print_json({"sandbox": found.model_dump(mode="json"), "metrics": figures.model_dump(mode="json")})
        return
    if network is None:
        print_model(found)
        return
    expiry = show_expiry(found.expires_at)
    if found.expires_at is not None:
        expiry += f" ({found.expires_at:%Y-%m-%d %H:%M:%S %Z})"
    print_fields(
        [
            ("name", found.name),
            ("id", found.id),
            ("state", f"stopped ({CUT_OFF})" if found.stop_reason is StopReason.FORCED else show_state(found)),
            *list_trouble(found),
            ("image", f"{found.image} ({found.image_id})" if found.image_id else found.image),
            ("began from", f"snapshot {found.snapshot_id}" if found.snapshot_id else ""),
            ("vcpus", str(found.vcpu_count)),
            ("memory", show_mebibytes(found.memory_mib)),
            ("disk", show_mebibytes(found.disk_mib)),
            ("address", network.address or ""),
            ("egress", show_egress(network.policy) if network.connected else "no network on this host"),
            ("rates", show_rates(network.policy)),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(found.labels.items()))),
            ("created", f"{found.created_at:%Y-%m-%d %H:%M:%S %Z} ({show_age(found.created_at)} ago)"),
            ("limits", expiry),
            ("" if expiry else "limits", show_idle_limit(found.auto_stop_after_idle_seconds)),
            ("last used", show_last_use(found)),
        ]
    )
    if figures is not None:
        print_fields(
            [
                ("cpu", f"{figures.cpu_used_percent:.0f} % of {figures.cpu_count}"),
                ("memory used", f"{show_bytes(figures.memory_used_bytes)} of {show_bytes(figures.memory_total_bytes)}"),
                ("disk used", f"{show_bytes(figures.disk_used_bytes)} of {show_bytes(figures.disk_total_bytes)}"),
                ("up for", f"{figures.uptime_seconds:.0f} s"),
            ]
        )
    if found.console_tail:
        print_line("\nthe last lines of its console:")
        print_line(printable_block(found.console_tail.rstrip()))
