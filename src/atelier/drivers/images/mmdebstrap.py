"""mmdebstrap's command line, and what an ordinary user needs for it.

Called by ``root_file_system`` and ``kernel_build``. As root it works on a folder, in namespaces of its own; an ordinary
user has it work in a user namespace with a range of subordinate ids.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from atelier.model.errors import HostError


def mmdebstrap(
    suite: str,
    architecture: str,
    packages: Sequence[str],
    connection: Sequence[str],
    *,
    output_format: str,
    excluded_paths: Sequence[str] = (),
    hooks: Sequence[str] = (),
) -> list[str]:
    """The words before target and sources. ``connection``: apt settings (``DebianArchive.connection_settings``);
    ``hooks`` run one after another once all packages are in. Source: mmdebstrap(1)."""
    root = os.geteuid() == 0
    # As root it mounts /proc, /sys and parts of /dev into the tree. In namespaces of its own these mounts and every
    # process end with it, however it ends; otherwise removing the tree of a killed build could reach the machine's /dev.
    confined = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"] if root else []
    arguments = [
        *confined,
        "mmdebstrap",
        "--verbose",
        "--variant=minbase",
        f"--mode={'root' if root else 'unshare'}",
        f"--format={output_format}",
        f"--architectures={architecture}",
        '--aptopt=APT::Install-Recommends "false"',
    ]
    # A power cut in the middle of a build costs the build, nothing else: dpkg need not wait for the disk.
    arguments.append("--dpkgopt=force-unsafe-io")
    arguments += [f"--aptopt={setting}" for setting in connection]
    if packages:
        arguments.append(f"--include={','.join(packages)}")
    arguments += [f"--dpkgopt=path-exclude={path}" for path in excluded_paths]
    arguments += [f"--customize-hook={hook}" for hook in hooks]
    return [*arguments, suite]


def check_user_namespace() -> None:
    """Raises HostError in words where an ordinary user cannot have a namespace with uids of its own."""
    if os.geteuid() == 0:
        return
    user = pwd.getpwuid(os.geteuid()).pw_name
    for file in (Path("/etc/subuid"), Path("/etc/subgid")):
        try:
            names = {line.split(":")[0] for line in file.read_text().splitlines()}
        except OSError:
            names = set[str]()
        if not names & {user, str(os.geteuid())}:
            raise HostError(
                f"images cannot be built as {user}: {file} grants this user no subordinate ids",
                code="no_subordinate_ids",
                hint=f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
            )
