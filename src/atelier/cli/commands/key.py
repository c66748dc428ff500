"""``atelier key``: ls, create, revoke."""

from __future__ import annotations

import click

from atelier.cli.invocation import DURATION, Invocation, json_option, pass_invocation


@click.group(short_help="Make and revoke API keys.", invoke_without_command=True)
@click.pass_context
def key(ctx: click.Context) -> None:
    """API keys, for programs. Alone: list one's own.

    \b
    Examples:
      atelier key create ci --scope read --scope write --expires-in 30d
      atelier key
      atelier key revoke k3fa2bcd4efg
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(ls)


@key.command(short_help="List keys.")
@click.option("--all", "everybodys", is_flag=True, help="Everybody's, for admins.")
@json_option("Print a list of keys as JSON.")
@pass_invocation
def ls(invocation: Invocation, everybodys: bool, as_json: bool) -> None:
    """List keys, oldest first. The keys themselves are kept nowhere.

    \b
    Example:
      atelier key ls
    """
    from atelier.cli.output import print_json, print_table, show_age
    from atelier.client import account_calls

    with invocation.connect() as connection:
        found = connection.send(account_calls.list_api_keys(everybodys=everybodys)).items
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    print_table(
        ("ID", "NAME", "ENDS IN", "SCOPES", "USED", "EXPIRES"),
        (
            (
                each.id,
                each.name,
                each.hint,
                ",".join(each.scopes),
                f"{show_age(each.last_used_at)} ago" if each.last_used_at else "never",
                each.expires_at.isoformat(timespec="seconds") if each.expires_at else "never",
            )
            for each in found
        ),
    )


@key.command(short_help="Make a key.")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["read", "write", "account", "admin"]),
    help="What it may be used for; several may be given.  [default: all that your key may]",
)
@click.option("--expires-in", "lifetime_seconds", type=DURATION, help="How long it is good: 90d, 12h.  [default: ever]")
@click.option("--for", "user", metavar="USER", help="Whose it is to be, by id or e-mail address, for admins.")
@json_option("Print the key as JSON.")
@pass_invocation
def create(
    invocation: Invocation,
    name: str,
    scopes: tuple[str, ...],
    lifetime_seconds: int | None,
    user: str | None,
    as_json: bool,
) -> None:
    """Make a key and print it, this once. For clients that insist on E2B's form, `e2b_` in place of `atl_` is the same key.

    \b
    Example:
      atelier key create ci --scope read --scope write --expires-in 30d
    """
    from datetime import UTC, datetime, timedelta

    from atelier.cli.output import print_line, print_model, print_note
    from atelier.client import account_calls
    from atelier.model.principal import Scope

    end = None if lifetime_seconds is None else datetime.now(UTC) + timedelta(seconds=lifetime_seconds)
    with invocation.connect() as connection:
        made = connection.send(account_calls.create_api_key(name, [Scope(each) for each in scopes], end, user))
    if as_json:
        print_model(made)
        return
    print_line(made.key)
    print_note(f"key {made.id}: shown this once; atelier key revoke {made.id} ends it")


@key.command(short_help="Revoke a key.")
@click.argument("key_id", metavar="ID")
@json_option("Print {id} as JSON.")
@pass_invocation
def revoke(invocation: Invocation, key_id: str, as_json: bool) -> None:
    """Revoke a key by its id. Its next request is refused.

    \b
    Example:
      atelier key revoke k3fa2bcd4efg
    """
    from atelier.cli.output import print_json, print_line
    from atelier.client import account_calls

    with invocation.connect() as connection:
        connection.send(account_calls.revoke_api_key(key_id))
    if as_json:
        print_json({"id": key_id})
        return
    print_line(f"revoked {key_id}")
