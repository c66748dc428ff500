"""``atelier exec``."""

from __future__ import annotations

import os
import stat
import sys

import click

from atelier.cli.invocation import PAIR, Invocation, json_option, pass_invocation, sandbox_argument


@click.command(
    "exec",
    short_help="Run a program in a sandbox.",
    # What follows SANDBOX belongs to the program, options included.
    context_settings={"allow_interspersed_args": False},
)
@sandbox_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin on although it is a terminal.")
@click.option("-n", "--no-stdin", is_flag=True, help="Do not pass stdin on although it is a pipe or file.")
@click.option("-t", "--tty", "terminal", is_flag=True, help="Give the program a terminal (as `shell` does).")
@click.option("-e", "--env", "environment", type=PAIR, multiple=True, help="A variable for the program; repeatable.")
@click.option("-w", "--workdir", "working_directory", default="", metavar="FOLDER", help="Where it starts.")
@click.option("-u", "--user", default="", metavar="NAME", help="Who it runs as.  [default: the image's user]")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="End it, and all that it started, after this time.")  # fmt: skip
@json_option("Print the events as lines of JSON, in the API's form (output in base64).")
@pass_invocation
def exec_command(
    invocation: Invocation,
    sandbox: str,
    command: tuple[str, ...],
    interactive: bool,
    no_stdin: bool,
    terminal: bool,
    environment: tuple[tuple[str, str], ...],
    working_directory: str,
    user: str,
    timeout_seconds: float | None,
    as_json: bool,
) -> None:
    """Run COMMAND in SANDBOX and end with its exit status.

    The program is started as it is, without a shell: for pipes and variables say sh -c '...'. Options of atelier
    stand before SANDBOX; everything behind it belongs to the program.

    Its stdout and stderr stay apart, and are shown as they are, as ssh does. stdin is passed on when it is a pipe or
    a file (-n: never; in a loop that reads a list, you want this), or with -i. Ctrl-C and other signals go to the
    program; Ctrl-C three times within three seconds leaves without it.

    \b
    Exit status: the program's own (128+N after signal N), or
      125  exec itself failed: no such sandbox, it does not run, no manager
      126, 127  as the guest says: the program cannot be run, does not exist

    \b
    Examples:
      atelier exec box uname -a
      atelier exec box -- sh -c 'ls | wc -l'
      tar c . | atelier exec -w /tmp box tar x
      atelier exec -t box python3
    """
    import asyncio

    from atelier.cli.execution import ExecOptions, exit_status, run_exec, status_of_failure
    from atelier.cli.output import print_error
    from atelier.model.errors import AtelierError

    words = list(command[1:] if command[0] == "--" else command)
    if not words:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    if interactive and no_stdin:
        raise click.UsageError("-i and -n exclude each other.")
    context = click.get_current_context()
    try:
        if terminal:
            _check_terminal(as_json, timeout_seconds)
            from atelier.cli.shown_terminals import OneShot
            from atelier.cli.terminal import run_terminal

            if environment:
                # The terminal's route takes no variables; env(1) is in every image that has a shell.
                words = ["env", *(f"{key}={value}" for key, value in environment), *words]
            shown = OneShot(invocation.endpoint(), sandbox, words, user=user, working_directory=working_directory)
            status = exit_status(asyncio.run(run_terminal(shown)))
        else:
            options = ExecOptions(
                sandbox=sandbox,
                command=words,
                environment=dict(environment),
                working_directory=working_directory,
                user=user,
                timeout_seconds=timeout_seconds,
                stdin=interactive or (not no_stdin and _stdin_is_piped()),
                as_json=as_json,
            )
            status = asyncio.run(run_exec(invocation.endpoint(), options))
    except AtelierError as error:
        print_error(error, as_json=as_json)
        status = status_of_failure(error)
    context.exit(status)


def _check_terminal(as_json: bool, timeout_seconds: float | None) -> None:
    from atelier.cli.terminal import is_terminal

    if as_json or timeout_seconds is not None:
        raise click.UsageError("-t goes together neither with --json nor with --timeout.")
    if not is_terminal():
        raise click.UsageError("-t needs a terminal at stdin and stdout.")


def _stdin_is_piped() -> bool:
    """Whether stdin is a pipe, a file or a socket. A terminal is not, nor is /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False  # closed
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
