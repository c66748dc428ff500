"""``atelier pool``: ls, set and drain."""

from __future__ import annotations

import click

from atelier.cli.invocation import MEBIBYTES, Invocation, json_option, pass_invocation


@click.group(short_help="Keep sandboxes ready to be taken.", invoke_without_command=True)
@click.pass_context
def pool(ctx: click.Context) -> None:
    """Warm pools: sandboxes made ahead of time, so that `create` only gives one a name. Alone: list them.

    \b
    Examples:
      atelier pool set base --size 5
      atelier pool
      atelier pool drain base
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(ls)


@pool.command(short_help="List warm pools.")
@json_option("Print a list of warm pools as JSON.")
@pass_invocation
def ls(invocation: Invocation, as_json: bool) -> None:
    """List the warm pools: how many sandboxes are to be ready, are, and are being made.

    \b
    Example:
      atelier pool ls
    """
    from atelier.cli.output import print_json, print_line, print_note, print_table, printable, show_mebibytes
    from atelier.client.warm_pools import WarmPool

    with invocation.connect() as connection:
        found = WarmPool.list(connection=connection)
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    if not found:
        print_line("no warm pools; `atelier pool set base --size 5` makes one")
        return
    print_table(
        ("IMAGE", "VCPUS", "MEMORY", "SIZE", "READY", "COMING"),
        (
            (
                each.image,
                str(each.vcpu_count),
                show_mebibytes(each.memory_mib),
                str(each.size),
                str(each.ready),
                str(each.coming),
            )
            for each in found
        ),
    )
    for each in found:
        if each.failure is not None:
            print_note(f"{printable(each.image)} stays short: {printable(each.failure.message)}")


@pool.command("set", short_help="Say how many are to be ready.")
@click.argument("image")
@click.option("-n", "--size", type=int, required=True, metavar="N", help="How many are to be ready; 0 drains.")
@click.option("--cpus", "vcpu_count", type=int, metavar="N", help="Virtual CPUs of each.  [default: 1]")
@click.option("--memory", "memory_mib", type=MEBIBYTES, help="Memory of each: 512, 512M or 2G.  [default: 512M]")
@json_option("Print the warm pool as JSON.")
@pass_invocation
def set_size(
    invocation: Invocation, image: str, size: int, vcpu_count: int | None, memory_mib: int | None, as_json: bool
) -> None:
    """Have N sandboxes of IMAGE with these sizes stand ready. Each counts against this host like any other, and gives way
    to what is asked for.

    A `create` takes one where it asks for this image, these sizes, the usual disk and no network policy of its own.

    \b
    Examples:
      atelier pool set base --size 5
      atelier pool set base --size 2 --cpus 2 --memory 2G
    """
    from atelier.cli.output import print_line, print_model, print_note, printable
    from atelier.client.warm_pools import WarmPool

    with invocation.connect() as connection:
        found = WarmPool.set(image, size, vcpu_count=vcpu_count, memory_mib=memory_mib, connection=connection)
    if as_json:
        print_model(found)
        return
    print_line(f"{printable(found.image)}  {found.ready} of {found.size} ready, {found.coming} coming")
    if found.failure is not None:
        print_note(f"it stays short: {printable(found.failure.message)}")


@pool.command(short_help="Give the warm pools of an image up.")
@click.argument("image")
@json_option("Print {drained} as JSON.")
@pass_invocation
def drain(invocation: Invocation, image: str, as_json: bool) -> None:
    """Destroy the sandboxes that wait in the warm pools of IMAGE, of whatever sizes, and make no more. What was taken
    stays.

    \b
    Example:
      atelier pool drain base
    """
    from atelier.cli.output import print_json, print_line, printable
    from atelier.client.warm_pools import WarmPool

    with invocation.connect() as connection:
        WarmPool.drain(image, connection=connection)
    if as_json:
        print_json({"drained": image})
    else:
        print_line(printable(image))
