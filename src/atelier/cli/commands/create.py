"""``atelier create``."""

from __future__ import annotations

from typing import Any

import click

from atelier.cli.invocation import (
    DURATION,
    MEBIBYTES,
    PAIR,
    RATE,
    Invocation,
    json_option,
    pass_invocation,
    waiting_options,
)


@click.command(short_help="Create a sandbox.")
@click.option("--name", metavar="NAME", help="A DNS label of at most 40 characters.  [default: generated]")
@click.option("--image", metavar="IMAGE", help="The image to start from.  [default: base]")
@click.option("--snapshot", metavar="SNAPSHOT", help="Go on from this snapshot, with its image, CPUs and memory.")
@click.option("--disk-only", is_flag=True, help="With --snapshot: boot from its disk, and leave its memory.")
@click.option("--cpus", "vcpu_count", type=int, metavar="N", help="Virtual CPUs.  [default: 1]")
@click.option("--memory", "memory_mib", type=MEBIBYTES, help="Memory: 512, 512M or 2G.  [default: 512M]")
@click.option("--disk", "disk_mib", type=MEBIBYTES, help="Disk: 4096, 4096M or 4G.  [default: 4G]")
@click.option("-e", "--env", "environment", type=PAIR, multiple=True, help="A variable for its programs; repeatable.")
@click.option("-l", "--label", "labels", type=PAIR, multiple=True, help="A label, for finding it again; repeatable.")
@click.option("--expires-in", "expires_in_seconds", type=DURATION, help="Destroy it after 30m, 2h, 1d.")
@click.option("--stop-when-idle", "idle_seconds", type=DURATION, help="Stop it when nobody has used it for so long.")
@click.option("--egress", type=click.Choice(["all", "none"]), help="What it may reach: the internet, or nothing.")
@click.option(
    "--allow", metavar="ENTRY", multiple=True,
    help="What it may reach: github.com, *.github.com, 203.0.113.0/24; nothing else, unless --egress all; repeatable.",
)  # fmt: skip
@click.option("--download", type=RATE, help="How fast it may receive: 512kbit, 10mbit, 1gbit.")
@click.option("--upload", type=RATE, help="How fast it may send.")
@waiting_options
@json_option("Print the sandbox as JSON.")
@pass_invocation
def create(
    invocation: Invocation,
    name: str | None,
    image: str | None,
    snapshot: str | None,
    disk_only: bool,
    vcpu_count: int | None,
    memory_mib: int | None,
    disk_mib: int | None,
    environment: tuple[tuple[str, str], ...],
    labels: tuple[tuple[str, str], ...],
    expires_in_seconds: int | None,
    idle_seconds: int | None,
    egress: str | None,
    allow: tuple[str, ...],
    download: int | None,
    upload: int | None,
    no_wait: bool,
    timeout_seconds: float,
    as_json: bool,
) -> None:
    """Create a sandbox and wait until it runs. Prints its name.

    If it fails, the reason and the last lines of its console are shown. An interrupted wait (Ctrl-C) takes the
    sandbox back, unless you named it.

    \b
    Examples:
      atelier create
      atelier create --name box --cpus 2 --memory 1G --disk 8G
      atelier create --expires-in 2h --stop-when-idle 30m
      atelier create --allow github.com --allow '*.github.com' --download 10mbit
      atelier create --egress none
      atelier create --snapshot ready --disk 16G
      box=$(atelier create --label team=web)
    """
    from atelier.cli.output import print_line, print_model, print_note, printable_block
    from atelier.cli.progress import waiting
    from atelier.client.sandbox import Sandbox
    from atelier.client.sandbox_failures import SandboxFailedError

    if disk_only and snapshot is None:
        raise click.UsageError("--disk-only says how to begin from a snapshot: name one with --snapshot.")
    policy = _network_policy(egress, allow, download, upload)
    with invocation.connect() as connection:
        try:
            with waiting(f"creating {name or 'a sandbox'}", shown=not as_json and not no_wait):
                sandbox = Sandbox.create(
                    name=name,
                    image=image,
                    vcpu_count=vcpu_count,
                    memory_mib=memory_mib,
                    disk_mib=disk_mib,
                    environment=dict(environment),
                    labels=dict(labels),
                    expires_in_seconds=expires_in_seconds,
                    auto_stop_after_idle_seconds=idle_seconds,
                    network=policy,
                    snapshot=snapshot,
                    disk_only=disk_only,
                    wait=not no_wait,
                    timeout_seconds=timeout_seconds,
                    connection=connection,
                )
        except KeyboardInterrupt:
            if name is not None:
                print_note(f"interrupted; {name} may still come up: remove it with `atelier rm {name}`")
            raise
        except SandboxFailedError as error:
            if not as_json and error.details.console_tail:
                print_note(f"the last lines of its console:\n{printable_block(error.details.console_tail.rstrip())}\n")
            raise
    if as_json:
        print_model(sandbox.details)
    else:
        print_line(sandbox.name)


def _network_policy(
    egress: str | None, allow: tuple[str, ...], download: int | None, upload: int | None
) -> dict[str, Any] | None:
    """As the API has it; None: nothing is said of it."""
    if egress is None and not allow and download is None and upload is None:
        return None
    from atelier.model.network_policy_edit import split_entries

    if egress == "none" and allow:
        raise click.UsageError("--egress none allows nothing; --allow alone allows its entries and nothing else.")
    networks, domains = split_entries(allow)
    return {
        "egress": {"mode": egress or ("list" if allow else "all"), "networks": networks, "domains": domains},
        "download_kbit_per_second": download,
        "upload_kbit_per_second": upload,
    }
