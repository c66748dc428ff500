"""``python -m atelier.host_setup``, which ``atelier host`` executes. Exit status: 0 done, 1 refused or failed, 2 wrong
usage, 130 interrupted."""

from __future__ import annotations

import signal
import sys

import click

from atelier.host_setup.commands import host, print_error
from atelier.model.errors import AtelierError


def main() -> int:
    try:
        status = host.main(prog_name="atelier host", standalone_mode=False)
    except AtelierError as error:
        print_error(error)
        return 1
    except (click.exceptions.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
