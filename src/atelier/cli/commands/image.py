"""``atelier image``: ls and build."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.group(short_help="Build and list images.")
def image() -> None:
    """Images: the root file systems that sandboxes start from."""


@image.command(short_help="List images.")
@json_option("Print {items, recipes} as JSON.")
@pass_invocation
def ls(invocation: Invocation, as_json: bool) -> None:
    """List the images that are built, and the names that can be.

    \b
    Example:
      atelier image ls
    """
    from atelier.cli.output import print_line, print_model, print_table, printable, show_age, show_bytes
    from atelier.client import calls

    with invocation.connect() as connection:
        found = connection.send(calls.list_images())
    if as_json:
        print_model(found)
        return
    if found.items:
        print_table(
            ("NAME", "ID", "SIZE", "STORED", "BUILT"),
            (
                (
                    each.name,
                    each.id,
                    f"{each.size_mib} MiB",
                    show_bytes(each.stored_bytes),
                    show_age(each.built_at) + " ago",
                )
                for each in found.items
            ),
        )
    else:
        print_line("no image is built yet")
    if unbuilt := sorted(set(found.recipes) - {each.name for each in found.items}):
        print_line(f"can be built: {printable(', '.join(unbuilt))}")


@image.command(short_help="Build an image.")
@click.argument("name", default="base")
@click.option(
    "--refresh", is_flag=True, help="Build again although the recipe is unchanged, to take in newer packages."
)
@json_option("Print every step as one line of JSON; the last one holds the image.")
@pass_invocation
def build(invocation: Invocation, name: str, refresh: bool, as_json: bool) -> None:
    """Build the image NAME (base), unless it is built already, and show the progress.

    Ctrl-C stops the watching only; the manager goes on building.

    \b
    Examples:
      atelier image build
      atelier image build base --refresh
    """
    from atelier.cli.output import print_line, printable, show_bytes
    from atelier.cli.progress import PhaseProgress
    from atelier.client import calls
    from atelier.model.errors import TransientError
    from atelier.schemas.images import BuildDoneEvent

    built = None
    with invocation.connect() as connection, PhaseProgress(shown=not as_json) as progress:
        for event in connection.lines(calls.build_image(name, refresh=refresh)):
            if as_json:
                print_line(event.model_dump_json())
            if isinstance(event, BuildDoneEvent):
                built = event.image
            else:
                progress.report(event.phase, event.message, event.fraction)
    if built is None:
        raise TransientError(
            f"the build of {name} broke off", code="connection_lost", hint="start it again: it goes on from its cache"
        )
    if not as_json:
        print_line(f"{printable(built.id)}  {built.size_mib} MiB, {show_bytes(built.stored_bytes)} stored")
