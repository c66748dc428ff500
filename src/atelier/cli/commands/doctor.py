"""``atelier doctor``: becomes the manager's program, which holds the checks and needs no running manager for them."""

from __future__ import annotations

import click

from atelier.cli.commands.up import become_manager
from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command(short_help="Check this machine.")
@click.option("--mode", type=click.Choice(["local", "mock"]), help="Check for this mode.")
@click.option("--reclaim", is_flag=True, help="Instead, list disks, memories and snapshots that belong to nobody.")
@click.option("-y", "--yes", is_flag=True, help="With --reclaim: remove them, for good.")
@click.option("--only", metavar="WHAT", multiple=True, help="With --reclaim: only this, as it is listed; repeatable.")
@json_option("Print the findings as JSON.")
@pass_invocation
def doctor(
    invocation: Invocation, mode: str | None, reclaim: bool, yes: bool, only: tuple[str, ...], as_json: bool
) -> None:
    """Check whether this machine is fit for Atelier. Changes nothing.

    Every finding comes with its remedy. Exit status 1 if something is missing.

    With --reclaim it asks the running manager for disks, memories of paused sandboxes and snapshots that belong to
    nobody, as after the restore of an older backup. They are kept until you say --yes.

    \b
    Examples:
      atelier doctor
      atelier doctor --json
      atelier doctor --reclaim
      atelier doctor --reclaim --yes
      atelier doctor --reclaim --yes --only memory/k3v9x2m4p7qd
    """
    if (yes or only) and not reclaim:
        raise click.UsageError("--yes and --only go with --reclaim.")
    if reclaim:
        _reclaim(invocation, remove=yes, only=only, as_json=as_json)
        return
    arguments = ["--doctor"]
    if as_json:
        arguments.append("--json")
    if mode:
        arguments += ["--mode", mode]
    if invocation.data_dir:
        arguments += ["--data-dir", invocation.data_dir]
    become_manager(arguments)


def _reclaim(invocation: Invocation, *, remove: bool, only: tuple[str, ...], as_json: bool) -> None:
    from atelier.cli.output import print_json, print_line, print_note, print_table, show_bytes
    from atelier.cli.several import on_each
    from atelier.client import lifecycle_calls

    with invocation.connect() as connection:
        listed = connection.send(lifecycle_calls.list_orphans()).items
        found = {f"{each.kind}/{each.id}": each for each in listed}
        if unknown := [what for what in only if what not in found]:
            raise click.UsageError(f"not in the list of `atelier doctor --reclaim`: {', '.join(unknown)}")
        found = {what: each for what, each in found.items() if not only or what in only}

        def remove_orphan(what: str) -> None:
            connection.send(lifecycle_calls.remove_orphan(found[what].kind, found[what].id))

        outcomes = on_each(list(found) if remove else [], remove_orphan, doing="removing", as_json=as_json)
    removed = [what for what, _ in outcomes.done]
    total = sum(each.used_bytes for each in found.values())
    if as_json:
        orphans = [each.model_dump(mode="json") for each in found.values()]
        failed = outcomes.failures_as_json()
        print_json({"orphans": orphans, "total_bytes": total, "removed": removed, "failed": failed})
    elif not found:
        print_line("every volume, memory and snapshot belongs to somebody")
    else:
        states = dict.fromkeys(removed, "removed") if remove else {}
        rows = [(what, show_bytes(each.used_bytes), states.get(what, "kept")) for what, each in found.items()]
        print_table(("WHAT", "USED", ""), rows)
        print_line(f"{len(found)}, {show_bytes(total)}, belonging to nobody")
        if not remove:
            print_note("`atelier doctor --reclaim --yes` removes them, for good; `--only WHAT` a single one")
    outcomes.finish(as_json=as_json)
