"""``atelier snapshots``: ls, get and rm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import PAIR, Invocation, json_option, pass_invocation

if TYPE_CHECKING:
    from atelier.schemas.snapshots import Snapshot


@click.group(short_help="List, show and delete snapshots.", invoke_without_command=True)
@click.pass_context
def snapshots(ctx: click.Context) -> None:
    """Snapshots: sandboxes as they stood at one moment, memory and disk, from which others begin. Alone: list them.

    \b
    Examples:
      atelier snapshots
      atelier snapshots ls --tree
      atelier snapshots rm ready
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(ls)


@snapshots.command(short_help="List snapshots.")
@click.option("--sandbox", metavar="SANDBOX", help="Only those of this sandbox, which may be gone.")
@click.option("-l", "--label", "labels", type=PAIR, multiple=True, help="Only those with this label; repeatable.")
@click.option("--tree", is_flag=True, help="Show below each what was taken of the sandboxes that began there.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
@json_option("Print a list of snapshots as JSON.")
@pass_invocation
def ls(
    invocation: Invocation,
    sandbox: str | None,
    labels: tuple[tuple[str, str], ...],
    tree: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """List the snapshots that are ready, oldest first, and those that are damaged.

    MEMORY and DISK are what they really occupy. One that is being taken is not in the list yet; `snapshots get` shows it.

    \b
    Examples:
      atelier snapshots ls
      atelier snapshots ls --tree --sandbox box
    """
    from atelier.cli.output import print_json, print_line, print_note, print_table, printable, show_age, show_bytes
    from atelier.client.snapshots import Snapshot

    with invocation.connect() as connection:
        listed = Snapshot.list(sandbox=sandbox, labels=dict(labels), connection=connection)
    found = [each.details for each in listed]
    rows = arrange_as_tree(found) if tree else [("", each) for each in found]
    if as_json:
        print_json([each.model_dump(mode="json") for _, each in rows])
    elif quiet:
        for _, each in rows:
            print_line(printable(each.name))
    elif not rows:
        print_line("no snapshots" + (" of that kind" if sandbox or labels else "; take one with `atelier snapshot`"))
    else:
        print_table(
            ("NAME", "ID", "STATE", "FOR", "SANDBOX", "MEMORY", "DISK", "AGE"),
            (
                (
                    f"{indent}{each.name}",
                    each.id,
                    each.state,
                    each.purpose,
                    each.sandbox_name,
                    show_bytes(each.memory_bytes),
                    show_bytes(each.disk_bytes),
                    show_age(each.created_at),
                )
                for indent, each in rows
            ),
        )
        for _, each in rows:
            if each.failure is not None:
                print_note(f"{printable(each.name)}: {each.state}: {printable(each.failure.message)}")


@snapshots.command(short_help="Show one snapshot.")
@click.argument("snapshot")
@json_option("Print the snapshot as JSON.")
@pass_invocation
def get(invocation: Invocation, snapshot: str, as_json: bool) -> None:
    """Show SNAPSHOT (a name or an id), in whatever state it is.

    \b
    Example:
      atelier snapshots get ready
    """
    from atelier.cli.output import print_fields, print_model, show_age, show_bytes, show_mebibytes
    from atelier.client import snapshot_calls

    with invocation.connect() as connection:
        found = connection.send(snapshot_calls.get_snapshot(snapshot))
    if as_json:
        print_model(found)
        return
    failure = found.failure
    print_fields(
        [
            ("name", found.name),
            ("id", found.id),
            ("state", found.state),
            ("trouble", f"{failure.message} [{failure.code}]" if failure else ""),
            ("hint", failure.hint if failure else ""),
            ("taken of", f"{found.sandbox_name} ({found.sandbox_id})"),
            ("taken for", found.purpose),
            ("parent", found.parent_id or ""),
            ("image", f"{found.image} ({found.image_id})"),
            ("vcpus", str(found.vcpu_count)),
            ("memory", f"{show_mebibytes(found.memory_mib)}, {show_bytes(found.memory_bytes)} stored"),
            ("disk", f"{show_mebibytes(found.disk_mib)}, {show_bytes(found.disk_bytes)} stored"),
            ("stood still", f"{found.stopped_ms:.0f} ms" if found.stopped_ms else ""),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(found.labels.items()))),
            ("keeps", f"the last {found.keep_last} of its sandbox" if found.keep_last else ""),
            ("created", f"{found.created_at:%Y-%m-%d %H:%M:%S %Z} ({show_age(found.created_at)} ago)"),
        ]
    )


@snapshots.command(short_help="Delete snapshots.")
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="A snapshot that does not exist is no error.")
@json_option("Print {removed, failed} as JSON.")
@pass_invocation
def rm(invocation: Invocation, snapshots: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Delete snapshots. One that a sandbox or another snapshot stands over is refused.

    \b
    Example:
      atelier snapshots rm ready
    """
    from atelier.cli.output import print_json, print_line, printable
    from atelier.cli.several import on_each
    from atelier.client import snapshot_calls
    from atelier.model.errors import NotFoundError

    with invocation.connect() as connection:

        def remove(name: str) -> None:
            try:
                connection.send(snapshot_calls.delete_snapshot(name))
            except NotFoundError:
                if not force:
                    raise

        outcomes = on_each(snapshots, remove, doing="deleting", as_json=as_json)
    removed = [name for name, _ in outcomes.done]
    if as_json:
        print_json({"removed": removed, "failed": outcomes.failures_as_json()})
    else:
        for name in removed:
            print_line(printable(name))
    outcomes.finish(as_json=as_json)


def arrange_as_tree(found: Sequence[Snapshot]) -> list[tuple[str, Snapshot]]:
    """Each below its parent, with what to print before its name. One whose parent is not among them is a root."""
    children: dict[str | None, list[Snapshot]] = {}
    known = {each.id for each in found}
    for each in found:
        children.setdefault(each.parent_id if each.parent_id in known else None, []).append(each)
    arranged: list[tuple[str, Snapshot]] = []
    # Deep trees are as good as any: no recursion.
    waiting = [("", "", each) for each in reversed(children.get(None, []))]
    while waiting:
        indent, branch, each = waiting.pop()
        arranged.append((indent + branch, each))
        below = indent + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        own = children.get(each.id, [])
        waiting.extend((below, "└─ " if child is own[-1] else "├─ ", child) for child in reversed(own))
    return arranged
