"""``atelier ls``."""

from __future__ import annotations

import click

from atelier.cli.invocation import PAIR, Invocation, json_option, pass_invocation


@click.command(short_help="List sandboxes.")
@click.option("--state", metavar="STATE", help="Only those in this state: running, failed, ...")
@click.option("-l", "--label", "labels", type=PAIR, multiple=True, help="Only those with this label; repeatable.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
@json_option("Print a list of sandboxes as JSON.")
@pass_invocation
def ls(
    invocation: Invocation, state: str | None, labels: tuple[tuple[str, str], ...], quiet: bool, as_json: bool
) -> None:
    """List sandboxes, newest first. What is stuck or has failed is explained below the list, on stderr.

    \b
    Examples:
      atelier ls
      atelier ls --state running --label team=web
      atelier ls --json
    """
    from atelier.cli.describing import list_trouble, show_limits, show_state
    from atelier.cli.output import print_json, print_line, print_note, print_table, printable, show_age, show_mebibytes
    from atelier.client.sandbox import Sandbox

    with invocation.connect() as connection:
        found = [each.details for each in Sandbox.list(state=state, labels=dict(labels), connection=connection)]
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
    elif quiet:
        for each in found:
            print_line(each.name)
    elif not found:
        print_line("no sandboxes" + (" of that kind" if state or labels else "; make one with `atelier create`"))
    else:
        print_table(
            ("NAME", "ID", "STATE", "IMAGE", "VCPU", "MEMORY", "DISK", "AGE", "LIMITS"),
            (
                (
                    each.name,
                    each.id,
                    show_state(each),
                    each.image,
                    str(each.vcpu_count),
                    show_mebibytes(each.memory_mib),
                    show_mebibytes(each.disk_mib),
                    show_age(each.created_at),
                    show_limits(each),
                )
                for each in found
            ),
        )
        for each in found:
            for label, text in list_trouble(each):
                print_note(f"{printable(each.name)}: {label}: {printable(text)}")
