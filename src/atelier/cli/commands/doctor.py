"""``atelier doctor``: becomes the manager's program, which holds the checks and needs no running manager for them."""

from __future__ import annotations

import click

from atelier.cli.commands.up import become_manager
from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command(short_help="Check this machine.")
@click.option("--mode", type=click.Choice(["local", "mock"]), help="Check for this mode.")
@click.option("--reclaim", is_flag=True, help="Instead, list disks that belong to no sandbox.")
@click.option("-y", "--yes", is_flag=True, help="With --reclaim: remove them, for good.")
@json_option("Print the findings as JSON.")
@pass_invocation
def doctor(invocation: Invocation, mode: str | None, reclaim: bool, yes: bool, as_json: bool) -> None:
    """Check whether this machine is fit for Atelier. Changes nothing.

    Every finding comes with its remedy. Exit status 1 if something is missing.

    With --reclaim it asks the running manager for disks that belong to no sandbox, as after the restore of an older
    backup. They are kept until you say --yes.

    \b
    Examples:
      atelier doctor
      atelier doctor --json
      atelier doctor --reclaim
      atelier doctor --reclaim --yes
    """
    if yes and not reclaim:
        raise click.UsageError("--yes goes with --reclaim.")
    if reclaim:
        _reclaim(invocation, remove=yes, as_json=as_json)
        return
    arguments = ["--doctor"]
    if as_json:
        arguments.append("--json")
    if mode:
        arguments += ["--mode", mode]
    if invocation.data_dir:
        arguments += ["--data-dir", invocation.data_dir]
    become_manager(arguments)


def _reclaim(invocation: Invocation, *, remove: bool, as_json: bool) -> None:
    from atelier.cli.output import print_json, print_line, print_note, print_table, show_bytes
    from atelier.cli.several import on_each
    from atelier.client import lifecycle_calls

    with invocation.connect() as connection:
        found = connection.send(lifecycle_calls.list_orphan_volumes()).items
        names = [each.sandbox_id for each in found] if remove else []

        def remove_volume(name: str) -> None:
            connection.send(lifecycle_calls.remove_orphan_volume(name))

        outcomes = on_each(names, remove_volume, doing="removing", as_json=as_json)
    removed = [name for name, _ in outcomes.done]
    total = sum(each.used_bytes for each in found)
    if as_json:
        volumes = [each.model_dump(mode="json") for each in found]
        failed = outcomes.failures_as_json()
        print_json({"volumes": volumes, "total_bytes": total, "removed": removed, "failed": failed})
    elif not found:
        print_line("every volume belongs to a sandbox")
    else:
        states = dict.fromkeys(removed, "removed") if remove else {}
        rows = [(each.sandbox_id, show_bytes(each.used_bytes), states.get(each.sandbox_id, "kept")) for each in found]
        print_table(("VOLUME", "USED", ""), rows)
        count = f"{len(found)} volume" + ("s" if len(found) > 1 else "")
        print_line(f"{count}, {show_bytes(total)}, without a sandbox")
        if not remove:
            print_note("`atelier doctor --reclaim --yes` removes them, for good")
    outcomes.finish(as_json=as_json)
