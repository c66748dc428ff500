"""Where the configuration of a host comes from: a file that was given, the host's own, or a person's answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from atelier.config.file import parse_config
from atelier.config.host import load_host_settings
from atelier.config.schema import config_template
from atelier.config.settings import load_settings_of
from atelier.host_setup.config_change import complete_config
from atelier.host_setup.host import Host
from atelier.host_setup.journal import FOLDER, Journal
from atelier.host_setup.plan import CONFIG, Plan, production_values
from atelier.model.errors import InvalidRequestError

Ask = Callable[[str, str], str]
"""A question and what is taken without an answer, to an answer."""


def choose_plan(host: Host, journal: Journal, given: Path | None, ask: Ask | None) -> Plan:
    """``ask`` None: nobody is there to be asked. Raises InvalidRequestError: a mistake in the file, with its line."""
    present = host.read(CONFIG)
    if given is not None:
        try:
            text, source = given.read_text(), given
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                f"the configuration {given} cannot be read: {error}", code="config_unreadable"
            ) from error
        return _plan(_completed(text, source), source, "")
    if present:
        is_own = journal.find("file", str(CONFIG)) is not None
        text = _completed(present, CONFIG) if is_own else present
        return _plan(text, CONFIG, present)
    answers = {} if ask is None else _ask_all(host, ask)
    values = production_values(has_group="storage.volume_group" in answers, has_caddy=False)
    return _plan(config_template({**values, **answers}), CONFIG, "")


def _completed(text: str, source: Path) -> str:
    file = parse_config(text, source)
    values = production_values(
        has_group=bool(file.get("storage.volume_group")), has_caddy=file.get("host.caddy") is True
    )
    return complete_config(text, values, source)


def _plan(text: str, source: Path, derived_from: str) -> Plan:
    file = parse_config(text, source)
    plan = Plan(load_settings_of(file), load_host_settings(file), text, derived_from, Path(sys.executable))
    plan.check()
    return plan


def _ask_all(host: Host, ask: Ask) -> dict[str, str]:
    """Only what nobody but a person can know."""
    answers: dict[str, str] = {}
    listen = ask("Where is the API to listen, for browsers and clients without a proxy?", "127.0.0.1:7420")
    answers["server.listen"] = f'"{listen}"'
    bridge = "br0" if not host.path("/sys/class/net/br0").exists() else "sandbr0"
    answers["network.bridge_name"] = f'"{ask("What is the bridge of the sandboxes to be called?", bridge)}"'
    answers["ssh.listen"] = f'"{ask("Where is SSH into sandboxes to be served? (off: nowhere)", "0.0.0.0:2222")}"'
    group = ask("Which LVM volume group are the disks to be in? (empty: they are files)", "")
    if group:
        answers["storage.volume_group"] = f'"{group}"'
        device = ask("An empty disk for that group, or a file for trials (empty: the group is there)", "")
        if device.startswith("/dev/"):
            answers["host.storage_device"] = f'"{device}"'
        elif device:
            answers["host.loop_file"] = f'"{device if device.startswith("/") else FOLDER / device}"'
            answers["host.loop_size_gib"] = ask("How large is that file to be, in GiB?", "20")
    release = ask("A release of Firecracker (.tgz, a folder, or an https: address; empty: QEMU)", "")
    if release:
        answers["host.firecracker"] = f'"{release}"'
        answers["host.firecracker_sha256"] = f'"{ask("Its SHA-256 checksum", "")}"'
    return answers
