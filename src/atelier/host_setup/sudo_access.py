"""The privileged helper program and the sudoers file that lets Atelier's user start it: their text, and whether a program
is root's alone.

Called by ``access_changes``, which puts both in place. Each entry states its one argument exactly: a wildcard of sudo's
matches spaces, and so further arguments.
"""

from __future__ import annotations

import re
from pathlib import Path

from atelier.host.privilege import GROUPS, PROGRAM, sudoers_entry
from atelier.model.errors import HostError, InvalidRequestError

SUDOERS = Path("/etc/sudoers.d/atelier")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
# What sudo would take for more than a path: Source: sudoers(5), "Other special characters and reserved words".
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_.+-]+)+")


def sudoers_text(user: str, program: Path = PROGRAM) -> str:
    """Raises InvalidRequestError for a user or a path that sudoers would read as something else."""
    if not _USER.fullmatch(user):
        raise InvalidRequestError(f"{user!r} is no name of a user's", code="invalid_user")
    if not _PLAIN_PATH.fullmatch(str(program)):
        raise InvalidRequestError(f"{program} is no plain absolute path", code="invalid_path")
    entries = "".join(f"{sudoers_entry(user, program, group)}\n" for group in GROUPS)
    return (
        "# Written by: atelier host init. What Atelier needs root for, and nothing else.\n"
        f"# No terminal is at hand, and requests pass through standard input as they are.\n"
        f"Defaults!{program} !requiretty, !use_pty, env_reset, !setenv\n"
        f"{entries}"
    )


def program_text(python: Path) -> str:
    """The helper program, for root's own Python: isolated, so that no variable and no folder of the asking side's decides
    what is imported."""
    return f"#!{python} -I\nimport sys\n\nfrom atelier.host_setup.privileged import main\n\nsys.exit(main())\n"


def check_roots_own(path: Path) -> None:
    """That nobody but root can change what ``path`` leads to. Raises HostError (``program_not_roots``)."""
    # Both ways: a link, as a virtual environment's Python is, lies where somebody could put another.
    for part in (*path.parents, path.resolve(), *path.resolve().parents):
        found = part.stat()
        # In a sticky folder nobody removes what is another's.
        if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & 0o1000):
            raise HostError(
                f"{part} can be changed by others than root, and root would run {path}",
                code="program_not_roots",
                hint=f"install Atelier for the whole host, or: chown root:root {part} && chmod go-w {part}",
            )
