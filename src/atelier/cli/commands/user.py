"""``atelier user``: ls, whoami, add, role, disable, enable, link."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation

if TYPE_CHECKING:
    from atelier.schemas.accounts import User


@click.group(short_help="Say who may enter.", invoke_without_command=True)
@click.pass_context
def user(ctx: click.Context) -> None:
    """Users. Nobody has a password: an identity provider vouches for them. Alone: list them.

    \b
    Examples:
      atelier user add ada@example.org
      atelier user role ada@example.org admin
      atelier user link
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(ls)


@user.command(short_help="List users.")
@json_option("Print a list of users as JSON.")
@pass_invocation
def ls(invocation: Invocation, as_json: bool) -> None:
    """List the users, oldest first.

    \b
    Example:
      atelier user ls
    """
    from atelier.cli.output import print_json, print_table, show_age
    from atelier.client import account_calls

    with invocation.connect() as connection:
        found = connection.send(account_calls.list_users()).items
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    print_table(
        ("ID", "NAME", "EMAIL", "ROLE", "STATE", "AGE"),
        (
            (
                each.id,
                each.name,
                each.email,
                each.role.value,
                "disabled" if each.is_disabled else "active",
                show_age(each.created_at),
            )
            for each in found
        ),
    )


@user.command(short_help="Show whose the key is.")
@json_option("Print it as JSON.")
@pass_invocation
def whoami(invocation: Invocation, as_json: bool) -> None:
    """Show whose key this is, and what it may be used for.

    \b
    Example:
      atelier user whoami
    """
    from atelier.cli.output import print_fields, print_model
    from atelier.client import account_calls

    with invocation.connect() as connection:
        found = connection.send(account_calls.get_whoami())
    if as_json:
        print_model(found)
        return
    scopes = ", ".join(found.scopes)
    print_fields((("name", found.name), ("user", found.user_id), ("role", found.role.value), ("scopes", scopes)))


@user.command(short_help="Let somebody sign in.")
@click.argument("email")
@click.option("--name", help="How they are called.  [default: the address]")
@click.option("--role", type=click.Choice(["member", "admin"]), default="member", show_default=True)
@json_option("Print the user as JSON.")
@pass_invocation
def add(invocation: Invocation, email: str, name: str | None, role: str, as_json: bool) -> None:
    """Let somebody sign in whose e-mail address an identity provider vouches for.

    \b
    Example:
      atelier user add ada@example.org --role admin
    """
    from atelier.client import account_calls
    from atelier.model.principal import Role

    with invocation.connect() as connection:
        _tell(connection.send(account_calls.add_user(email, name, Role(role))), as_json=as_json)


@user.command(short_help="Change somebody's role.")
@click.argument("user")
@click.argument("role", type=click.Choice(["member", "admin"]))
@json_option("Print the user as JSON.")
@pass_invocation
def role(invocation: Invocation, user: str, role: str, as_json: bool) -> None:
    """Change the role of USER, given by id or e-mail address.

    \b
    Example:
      atelier user role ada@example.org admin
    """
    from atelier.client import account_calls
    from atelier.model.principal import Role

    with invocation.connect() as connection:
        _tell(connection.send(account_calls.change_user(user, role=Role(role))), as_json=as_json)


@user.command(short_help="Let somebody in no more.")
@click.argument("user")
@json_option("Print the user as JSON.")
@pass_invocation
def disable(invocation: Invocation, user: str, as_json: bool) -> None:
    """Refuse USER's keys and sessions from the next request on. Their sandboxes stay.

    \b
    Example:
      atelier user disable ada@example.org
    """
    from atelier.client import account_calls

    with invocation.connect() as connection:
        _tell(connection.send(account_calls.change_user(user, is_disabled=True)), as_json=as_json)


@user.command(short_help="Let somebody in again.")
@click.argument("user")
@json_option("Print the user as JSON.")
@pass_invocation
def enable(invocation: Invocation, user: str, as_json: bool) -> None:
    """Let USER in again; their keys are good again, and they have to sign in anew.

    \b
    Example:
      atelier user enable ada@example.org
    """
    from atelier.client import account_calls

    with invocation.connect() as connection:
        _tell(connection.send(account_calls.change_user(user, is_disabled=False)), as_json=as_json)


@user.command(short_help="Make a new first-run link.")
@json_option("Print it as JSON.")
@pass_invocation
def link(invocation: Invocation, as_json: bool) -> None:
    """Make a link that signs the local admin in, in a browser, once, within 24 hours. The one before is worth nothing
    then. Refused once there is another admin.

    \b
    Example:
      atelier user link
    """
    from atelier.cli.output import print_line, print_model
    from atelier.client import account_calls

    with invocation.connect() as connection:
        made = connection.send(account_calls.create_first_run_link())
    if as_json:
        print_model(made)
        return
    print_line(made.url)


def _tell(found: User, *, as_json: bool) -> None:
    from atelier.cli.output import print_line, print_model, printable

    if as_json:
        print_model(found)
        return
    state = "disabled" if found.is_disabled else "active"
    print_line(f"{printable(found.email or found.name)} is {state}, as {found.role}")
