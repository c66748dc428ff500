"""``atelier shell``."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandbox_argument


@click.command(
    short_help="Open a terminal in a sandbox.",
    context_settings={"allow_interspersed_args": False},
)
@sandbox_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("-u", "--user", default="", metavar="NAME", help="Who it runs as.  [default: the image's user]")
@click.option("-w", "--workdir", "working_directory", default="", metavar="FOLDER", help="Where it starts.")
@click.option(
    "--attach", "pid", type=click.IntRange(min=1), metavar="PID", help="An open terminal again, not a new one."
)
@click.option(
    "--session", metavar="NAME", help="A terminal that lives on, by title or id; a new one if none has this title."
)
@json_option("When it has ended, print {exit_code} as JSON.")
@pass_invocation
def shell(
    invocation: Invocation,
    sandbox: str,
    command: tuple[str, ...],
    user: str,
    working_directory: str,
    pid: int | None,
    session: str | None,
    as_json: bool,
) -> None:
    """Open a terminal in SANDBOX with a login shell, or with COMMAND.

    All keys go to the sandbox. Ctrl-] three times within a second leaves it; the program goes on, and --attach comes
    back to it. When the connection is lost (a restart of the manager, say), it is made again for half a minute.
    What programs write reaches your terminal as it is, as with ssh.

    With --session it is a terminal that lives on in SANDBOX, as those of the browser's page, until its program ends or it
    is closed (`atelier terminals` lists them): whoever comes back, from any machine, sees what was written before. One that
    exists goes on as it is, whatever COMMAND says. The end of your own terminal ends nothing there.

    Ends with the program's exit status, or 125 if the terminal itself failed.

    \b
    Examples:
      atelier shell box
      atelier shell -u root box
      atelier shell box htop
      atelier shell --session work box
    """
    import asyncio

    from atelier.cli.execution import exit_status
    from atelier.cli.output import print_error, print_json
    from atelier.cli.shown_terminals import OneShot, ShownTerminal, find_or_open
    from atelier.cli.terminal import EXIT_TERMINAL_FAILED, current_size, is_terminal, run_terminal
    from atelier.model.errors import AtelierError

    words = list(command[1:] if command[:1] == ("--",) else command)
    if pid is not None and words:
        raise click.UsageError("--attach and COMMAND exclude each other.")
    if session is not None and (pid is not None or not session.strip()):
        raise click.UsageError("--session wants a name, and goes without --attach.")
    if not is_terminal():
        raise click.UsageError("This needs a terminal at stdin and stdout; without one use `atelier exec`.")

    async def run() -> int:
        endpoint = invocation.endpoint()
        shown: ShownTerminal
        if session is None:
            shown = OneShot(endpoint, sandbox, words, user=user, working_directory=working_directory, pid=pid)
        else:
            shown = await find_or_open(
                endpoint, sandbox, session, words,
                size=current_size(), user=user, working_directory=working_directory,
            )  # fmt: skip
        return await run_terminal(shown)

    try:
        status = exit_status(asyncio.run(run()))
        if as_json:
            print_json({"exit_code": status})
    except AtelierError as error:
        print_error(error, as_json=as_json)
        status = EXIT_TERMINAL_FAILED
    click.get_current_context().exit(status)
