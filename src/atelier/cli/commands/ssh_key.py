"""``atelier ssh-key``: ls, add, rm."""

from __future__ import annotations

from pathlib import Path

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.group("ssh-key", short_help="Register public keys for SSH.", invoke_without_command=True)
@click.pass_context
def ssh_key(ctx: click.Context) -> None:
    """Public keys, by which one enters sandboxes over SSH. Alone: list one's own.

    \b
    Examples:
      atelier ssh-key add ~/.ssh/id_ed25519.pub
      atelier ssh-key
      atelier ssh-key rm k3fa2bcd4efg
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(ls)


@ssh_key.command(short_help="List keys.")
@click.option("--all", "everybodys", is_flag=True, help="Everybody's, for admins.")
@json_option("Print a list of keys as JSON.")
@pass_invocation
def ls(invocation: Invocation, everybodys: bool, as_json: bool) -> None:
    """List keys, oldest first.

    \b
    Example:
      atelier ssh-key ls
    """
    from atelier.cli.output import print_json, print_table, show_age
    from atelier.client import ssh_calls

    with invocation.connect() as connection:
        found = connection.send(ssh_calls.list_ssh_keys(everybodys=everybodys)).items
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    print_table(
        ("ID", "NAME", "TYPE", "FINGERPRINT", "ADDED"),
        ((each.id, each.name, each.type, each.fingerprint, f"{show_age(each.created_at)} ago") for each in found),
    )


@ssh_key.command(short_help="Add a key.")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True))
@click.option("--name", help="What to call it.  [default: its comment]")
@click.option("--for", "user", metavar="USER", help="Whose it is to be, by id or e-mail address, for admins.")
@json_option("Print the key as JSON.")
@pass_invocation
def add(invocation: Invocation, file: Path, name: str | None, user: str | None, as_json: bool) -> None:
    """Register the public key in FILE (-: standard input).

    \b
    Example:
      atelier ssh-key add ~/.ssh/id_ed25519.pub
    """
    from atelier.cli.output import print_line, print_model
    from atelier.client import ssh_calls

    with click.open_file(str(file), errors="replace") as opened:
        text = opened.read(_FILE_MAX_CHARACTERS)
    with invocation.connect() as connection:
        made = connection.send(ssh_calls.add_ssh_key(text, name, user))
    if as_json:
        print_model(made)
        return
    print_line(f"{made.id}  {made.fingerprint}  {made.name}")


@ssh_key.command(short_help="Forget a key.")
@click.argument("key_id", metavar="ID")
@json_option("Print {id} as JSON.")
@pass_invocation
def rm(invocation: Invocation, key_id: str, as_json: bool) -> None:
    """Forget a key by its id. It opens nothing more; what it has opened stays open.

    \b
    Example:
      atelier ssh-key rm k3fa2bcd4efg
    """
    from atelier.cli.output import print_json, print_line
    from atelier.client import ssh_calls

    with invocation.connect() as connection:
        connection.send(ssh_calls.delete_ssh_key(key_id))
    if as_json:
        print_json({"id": key_id})
        return
    print_line(f"forgot {key_id}")


_FILE_MAX_CHARACTERS = 15_000
