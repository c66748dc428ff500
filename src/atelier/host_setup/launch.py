"""``python -m atelier.host_setup.launch gateway|network``: what the host's services execute. Reads the configuration, and
becomes the program with the arguments that the manager would start it with.

Runs as Atelier's user. Exit status 75 (try again) while the manager has not made its database yet.
"""

from __future__ import annotations

import os
import sys

from atelier.config.settings import Settings, load_settings
from atelier.db.closed_files import read_installation_id
from atelier.host.files import ensure_private_folder
from atelier.model.errors import AtelierError
from atelier.model.layout import DataLayout, RunLayout

_TRY_AGAIN = 75


def main(arguments: list[str] | None = None) -> int:  # noqa: RET503  execv does not return
    words = sys.argv[1:] if arguments is None else arguments
    if words not in (["gateway"], ["network"]):
        sys.stderr.write("usage: python -m atelier.host_setup.launch gateway|network\n")
        return 2
    try:
        settings = load_settings()
        # Whoever of the services is first makes it.
        ensure_private_folder(settings.run_dir)
        program = gateway_program(settings) if words == ["gateway"] else network_program(settings)
    except AtelierError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return 1
    if program is None:
        sys.stderr.write("the manager has not made its database yet; this comes after it\n")
        return _TRY_AGAIN
    os.execv(sys.executable, [sys.executable, "-P", "-m", *program])  # noqa: S606


def gateway_program(settings: Settings) -> list[str]:
    return ["atelier.gateway", "--run-dir", str(settings.run_dir)]


def network_program(settings: Settings) -> list[str] | None:
    data, run = DataLayout(settings.data_dir), RunLayout(settings.run_dir)
    installation_id = read_installation_id(data.database)
    if installation_id is None:
        return None
    return [
        *("atelier.network_holder", "--run-dir", str(run.root), "--plan-file", str(data.network_plan)),
        *("--installation", installation_id, "--home", "host", "--bridge-name", settings.bridge_name),
    ]


if __name__ == "__main__":
    sys.exit(main())
