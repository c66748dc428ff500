"""``atelier``: the entry point. Imports click and what the list of commands needs, nothing slower."""

from __future__ import annotations

import signal
import sys

import click

from atelier import __version__
from atelier.cli.invocation import Invocation
from atelier.cli.lazy_group import LazyCommand, LazyGroup

_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 128 + signal.SIGINT

_COMMANDS = "atelier.cli.commands"
COMMANDS = {
    "up": LazyCommand(f"{_COMMANDS}.up:up", "Start Atelier here and stay in the foreground."),
    "down": LazyCommand(f"{_COMMANDS}.down:down", "Stop the sandboxes and end Atelier."),
    "create": LazyCommand(f"{_COMMANDS}.create:create", "Create a sandbox."),
    "ls": LazyCommand(f"{_COMMANDS}.ls:ls", "List sandboxes."),
    "get": LazyCommand(f"{_COMMANDS}.get:get", "Show one sandbox."),
    "exec": LazyCommand(f"{_COMMANDS}.exec:exec_command", "Run a program in a sandbox."),
    "shell": LazyCommand(f"{_COMMANDS}.shell:shell", "Open a terminal in a sandbox."),
    "terminals": LazyCommand(f"{_COMMANDS}.terminals:terminals", "List a sandbox's terminals that live on."),
    "terminal-close": LazyCommand(f"{_COMMANDS}.terminals:terminal_close", "End terminals that live on."),
    "stop": LazyCommand(f"{_COMMANDS}.stop:stop", "Shut sandboxes down; their disks stay."),
    "start": LazyCommand(f"{_COMMANDS}.start:start", "Boot stopped or failed sandboxes again."),
    "restart": LazyCommand(f"{_COMMANDS}.restart:restart", "Stop sandboxes and start them again."),
    "pause": LazyCommand(f"{_COMMANDS}.pause:pause", "Put sandboxes on disk, memory included."),
    "resume": LazyCommand(f"{_COMMANDS}.resume:resume", "Let paused sandboxes go on where they stood."),
    "snapshot": LazyCommand(f"{_COMMANDS}.snapshot:snapshot", "Save a running sandbox, to begin others there."),
    "fork": LazyCommand(f"{_COMMANDS}.fork:fork", "Make copies of a running sandbox."),
    "snapshots": LazyCommand(f"{_COMMANDS}.snapshots:snapshots", "List, show and delete snapshots."),
    "pool": LazyCommand(f"{_COMMANDS}.pool:pool", "Keep sandboxes ready to be taken."),
    "resize": LazyCommand(f"{_COMMANDS}.resize:resize", "Grow a sandbox's disk."),
    "extend": LazyCommand(f"{_COMMANDS}.extend:extend", "Change how long a sandbox lives."),
    "network": LazyCommand(f"{_COMMANDS}.network:network", "Show and limit what a sandbox reaches."),
    "retry": LazyCommand(f"{_COMMANDS}.retry:retry", "Try again what is stuck with sandboxes."),
    "cp": LazyCommand(f"{_COMMANDS}.cp:cp", "Copy files and folders into and out of a sandbox."),
    "logs": LazyCommand(f"{_COMMANDS}.logs:logs", "Show a sandbox's serial console."),
    "rm": LazyCommand(f"{_COMMANDS}.rm:rm", "Destroy sandboxes."),
    "image": LazyCommand(f"{_COMMANDS}.image:image", "Build and list images."),
    "events": LazyCommand(f"{_COMMANDS}.events:events", "Follow what happens to sandboxes."),
    "user": LazyCommand(f"{_COMMANDS}.user:user", "Say who may enter."),
    "key": LazyCommand(f"{_COMMANDS}.key:key", "Make and revoke API keys."),
    "ssh-key": LazyCommand(f"{_COMMANDS}.ssh_key:ssh_key", "Register public keys for SSH."),
    "ssh-config": LazyCommand(f"{_COMMANDS}.ssh_config:ssh_config", "Print what ~/.ssh/config needs."),
    "ports": LazyCommand(f"{_COMMANDS}.ports:ports", "List a sandbox's ports and where to visit them."),
    "open": LazyCommand(f"{_COMMANDS}.open:open_preview", "Print where to visit a port, or open it in a browser."),
    "port-share": LazyCommand(f"{_COMMANDS}.port_share:port_share", "Say who may visit a port."),
    "share": LazyCommand(f"{_COMMANDS}.share:share", "Share a sandbox with others."),
    "audit": LazyCommand(f"{_COMMANDS}.audit:audit", "Show who did what."),
    "backup": LazyCommand(f"{_COMMANDS}.backup:backup", "Save the database and the key, on request disks too."),
    "restore": LazyCommand(f"{_COMMANDS}.restore:restore", "Bring a backup back, here or on another machine."),
    "doctor": LazyCommand(f"{_COMMANDS}.doctor:doctor", "Check whether this machine is fit, and say what is missing."),
    "host": LazyCommand(f"{_COMMANDS}.host:host", "As root: make a production host of this machine."),
    "version": LazyCommand(f"{_COMMANDS}.version:version", "Show the versions of this program and of the manager."),
}

_EPILOG = """\b
Examples:
  atelier up                                  start, in a terminal of its own
  atelier create --name box                   a sandbox, ready when this returns
  atelier exec box -- python3 -c 'print(1)'   run a program, no shell between
  atelier shell box                           a terminal
  atelier cp ./project box:work               copy a folder in
  atelier stop box                            shut it down; atelier start box
  atelier pause box                           freeze it; the next use wakes it
  atelier snapshot box ready                  save it; atelier create --snapshot ready
  atelier fork box --count 5                  five that go on from where it is
  atelier pool set base --size 5              keep five ready to be taken
  atelier rm box                              destroy it
  atelier down                                stop everything, end Atelier

\b
Environment:
  ATELIER_API_URL, ATELIER_API_KEY   a manager elsewhere; without them the one
                                     that this user runs here is found
  ATELIER_DATA_DIR                   its data folder, if not the usual one

\b
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
`exec` and `shell` end with the program's own status, or 125 if they failed
themselves.
"""


@click.group(
    cls=LazyGroup,
    lazy_commands=COMMANDS,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="atelier", message="%(prog)s %(version)s")
@click.option("--api-url", metavar="URL", default="", help="The manager's address, instead of ATELIER_API_URL.")
@click.option("--data-dir", metavar="FOLDER", default="", help="The data folder, instead of ATELIER_DATA_DIR.")
@click.pass_context
def cli(ctx: click.Context, api_url: str, data_dir: str) -> None:
    """Sandboxes that are real virtual machines, on your own machine."""
    ctx.obj = Invocation(api_url=api_url, data_dir=data_dir)


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal whose charset lacks a character is no reason to fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore
    try:
        status = cli.main(prog_name="atelier", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(_EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code if not isinstance(error, click.UsageError) else _EXIT_USAGE)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
