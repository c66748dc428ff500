"""The commands of ``atelier host``: options, questions, what is printed. What is done is the other modules'."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from atelier.config.file import parse_config, read_config_file
from atelier.config.host import load_host_settings
from atelier.config.schema import config_schema, config_template
from atelier.config.settings import load_settings_of
from atelier.host.checks.local import CheckStatus
from atelier.host_setup.changes import UndoOptions
from atelier.host_setup.choosing import choose_plan
from atelier.host_setup.debug_vm import describe_vm
from atelier.host_setup.doctor import check_host
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Journal
from atelier.host_setup.plan import CONFIG, PRODUCTION_VALUES, RUN_FOLDER, Plan
from atelier.host_setup.provision import Area, apply, survey, undo_all
from atelier.host_setup.removal import end_sandboxes
from atelier.host_setup.surroundings import notes
from atelier.host_setup.update import install_release, restart_services
from atelier.model.errors import AccessDeniedError, AtelierError, InvalidRequestError

F = TypeVar("F", bound=Callable[..., Any])

_MARKS = {CheckStatus.OK: "ok", CheckStatus.WARNING: "warn", CheckStatus.FAILED: "FAIL"}
_AREAS = {
    "network": "Let the host forward sandboxes' packets.",
    "storage": "Have the volume group and the thin pool.",
    "firecracker": "Install Firecracker and its jailer.",
    "systemd": "Have the services, and start them.",
    "caddy": "Have Caddy in front.",
    "ssh": "Check that the port of SSH is free.",
    "packages": "Install what Atelier needs.",
    "account": "Have the user, its folders, the configuration.",
    "privileges": "Have what the manager may ask of root.",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def host() -> None:
    """Make a production host of this machine, look after it, or undo it. Needs root.

    \b
    Examples:
      atelier host init                        ask what has to be asked, show, do it
      atelier host init --config host.toml --yes
      atelier host init --check                show what would change, change nothing
      atelier host doctor
      atelier host uninstall --keep-data
    """


def _config_option(function: F) -> F:
    return click.option(
        "--config", "given", type=click.Path(path_type=Path, dir_okay=False),
        help=f"The configuration to set this host up by, instead of {CONFIG}.",
    )(function)  # fmt: skip


_check_option = click.option("--check", "only_check", is_flag=True, help="Show what would change, and change nothing.")
_yes_option = click.option("-y", "--yes", is_flag=True, help="Ask nothing.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@host.command(short_help="Set this machine up.")
@_config_option
@_check_option
@_yes_option
@_json_option
def init(given: Path | None, only_check: bool, yes: bool, as_json: bool) -> None:
    """Make a production host of this machine: packages, account, network, storage, rights, services.

    Everything is looked at first; what is somebody else's is named, with what to do about it, and nothing is changed then.
    It may be interrupted and run again, and does only what is missing. `atelier host uninstall` takes it back.

    \b
    Examples:
      atelier host init
      atelier host init --check
      atelier host init --config host.toml --yes
    """
    _provision(None, given, only_check=only_check, yes=yes, as_json=as_json)


def _area_command(name: str, summary: str) -> click.Command:
    @click.command(name, short_help=summary, help=f"{summary} The part `{name}` of `atelier host init`, alone.")
    @_config_option
    @_check_option
    @_yes_option
    @_json_option
    def command(given: Path | None, only_check: bool, yes: bool, as_json: bool) -> None:
        _provision(name, given, only_check=only_check, yes=yes, as_json=as_json)

    return command


for _name, _summary in _AREAS.items():
    host.add_command(_area_command(_name, _summary))


def _provision(only: str | None, given: Path | None, *, only_check: bool, yes: bool, as_json: bool) -> None:
    require_root()
    machine = Host()
    journal = Journal.open(machine)
    is_person = sys.stdin.isatty() and sys.stderr.isatty() and not yes and not as_json
    plan = choose_plan(machine, journal, given, _ask if is_person and not only_check else None)
    areas = [area for area in plan.areas() if only is None or area.name == only]
    if not areas:
        raise InvalidRequestError(
            f"the configuration asks for nothing of {only}", code="nothing_to_do", hint=_NOTHING.get(only or "", "")
        )
    found = asyncio.run(survey(machine, journal, areas))
    beside = asyncio.run(notes(machine)) if only is None else []
    if as_json and only_check:
        document = {
            "would_change": [{"area": area, "what": what} for area, what in found.wanted],
            "conflicts": [{"what": each.words, "remedy": each.remedy} for each in found.conflicts],
            "notes": beside,
        }
        print_json(document)
        raise SystemExit(1 if found.conflicts else 0)
    for words in beside:
        say(f"note: {words}")
    for area, what in found.wanted:
        say(f"  {'would' if only_check else 'will':5} {area:11} {what}")
    found.refuse_conflicts()
    if only_check or not found.wanted:
        say(f"{len(found.wanted)} changes would be made" if found.wanted else "nothing is to be changed")
        return
    if is_person:
        click.confirm("Change this machine so?", abort=True, err=True)
    elif not yes:
        raise InvalidRequestError(
            "nobody is there to be asked", code="not_confirmed", hint="--yes does it, --check shows it"
        )
    count = _apply(machine, journal, areas)
    if as_json:
        print_json({"changed": count})
    else:
        say(f"done: {count} changes. `atelier host doctor` looks whether all is well")


_NOTHING = {
    "firecracker": "name a release in it: host.firecracker",
    "storage": "name a volume group in it: storage.volume_group",
    "caddy": "host.caddy = true",
    "network": "network.kind is closed",
}


def _apply(machine: Host, journal: Journal, areas: Sequence[Area]) -> int:
    def progress(area: str, what: str) -> None:
        say(f"  {area:11} {what} ...")

    with journal.lock():
        return asyncio.run(apply(machine, journal, areas, progress))


@host.command(short_help="Check this host.")
@_json_option
def doctor(as_json: bool) -> None:
    """Check whether this host is as Atelier needs it. Changes nothing. Exit status 1 if something is missing."""
    require_root()
    machine = Host()
    journal = Journal.open(machine)
    results = asyncio.run(check_host(machine, journal, _present_plan(machine, journal)))
    if as_json:
        print_json({"checks": [dataclasses.asdict(each) for each in results]})
    else:
        for each in results:
            print_line(f"  {_MARKS[each.status]:4}  {each.name}: {each.message}")
            if each.remedy:
                print_line(f"        -> {each.remedy}")
    raise SystemExit(1 if any(each.status is CheckStatus.FAILED for each in results) else 0)


@host.command(short_help="Check the configuration, or print what may stand in it.")
@click.option("--schema", is_flag=True, help="Print the JSON schema.")
@click.option("--template", is_flag=True, help="Print a documented file for a production host.")
@click.option("--check", "file", type=click.Path(path_type=Path, dir_okay=False), help="Check this file.")
def config(schema: bool, template: bool, file: Path | None) -> None:
    """Check a configuration file: the host's own, unless --check names another. Needs no root."""
    if schema:
        print_json(config_schema())
    elif template:
        print_line(config_template(PRODUCTION_VALUES).rstrip("\n"))
    else:
        path = file or CONFIG
        found = read_config_file(path)
        load_settings_of(found)
        load_host_settings(found)
        print_line(f"{path}: {len(found.values)} settings, all of them fit")


@host.command(short_help="Have the guests' kernel and base image built.")
def kernel() -> None:
    """Build the guests' kernel and the base image now, so that the first sandbox does not wait for it. The manager runs."""
    require_root()
    machine = Host()
    plan = _present_plan(machine, Journal.open(machine))
    become(
        *("runuser", "--user", plan.host.user, "--", "env", f"ATELIER_DATA_DIR={plan.settings.data_dir}"),
        *(sys.executable, "-P", "-m", "atelier.cli", "image", "build"),
    )


@host.command("debug-vm", short_help="Show all that belongs to a sandbox.")
@click.argument("sandbox_id")
@_json_option
def debug_vm(sandbox_id: str, as_json: bool) -> None:
    """Show what on this host belongs to the sandbox SANDBOX_ID: process, link, volume, files, console. Changes nothing."""
    require_root()
    machine = Host()
    plan = _present_plan(machine, Journal.open(machine))
    found = asyncio.run(describe_vm(machine, plan.settings, sandbox_id))
    if as_json:
        print_json([{"what": what, "text": text} for what, text in found])
        return
    for what, text in found:
        print_line(f"{what:14} {printable(text)}")


@host.command(short_help="Install another version, and restart the services.")
@click.argument("source")
@_yes_option
def update(source: str, yes: bool) -> None:
    """Install Atelier from SOURCE (a wheel, or a checkout) in place of this version, bring the host up to it, restart the
    services. Sandboxes go on meanwhile."""
    require_root()
    machine = Host()
    plan = _present_plan(machine, Journal.open(machine))
    if not yes:
        click.confirm(f"Install {source} for {plan.python}?", abort=True, err=True)
    asyncio.run(install_release(machine, plan.python, source))
    say("installed; bringing the host up to it")
    asyncio.run(restart_services(machine, plan))
    say("done")


@host.command(short_help="Take back what init has made.")
@click.option("--keep-data/--remove-data", "keeps", default=None, help="Database, disks, images: keep or remove them.")
@click.option("--packages", is_flag=True, help="Remove the packages that init has installed, too.")
@_yes_option
@_json_option
def uninstall(keeps: bool | None, packages: bool, yes: bool, as_json: bool) -> None:
    """Remove exactly what `atelier host init` has made on this machine, and nothing else.

    Sandboxes are stopped first; with --remove-data they are destroyed. What is kept is listed, and a later
    `atelier host uninstall --remove-data --packages` removes it.
    """
    require_root()
    machine = Host()
    journal = Journal.open(machine)
    if not journal.entries:
        say("Atelier has made nothing on this host")
        return
    if keeps is None:
        raise click.UsageError("Say what becomes of database, disks and images: --keep-data or --remove-data.")
    if not yes:
        what = "keep all data" if keeps else "REMOVE ALL SANDBOXES, DISKS AND THE DATABASE"
        click.confirm(f"Remove Atelier from this host, and {what}?", abort=True, err=True)
    with journal.lock():
        asyncio.run(end_sandboxes(machine, journal, _run_dir(machine), destroy=not keeps, say=say))
        done = asyncio.run(
            undo_all(
                machine,
                journal,
                UndoOptions(data=not keeps, packages=packages),
                lambda area, what: say(f"  {area:11} {what}"),
            )
        )
    journal.close()
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    for words in done.left:
        say(f"left: {words}")
    for words in done.kept:
        say(f"kept: {words}")
    say("done" if not done.kept else "done; what is kept goes with: atelier host uninstall --remove-data --packages")


def _run_dir(machine: Host) -> Path:
    """Also where the configuration is broken by now."""
    try:
        return load_settings_of(parse_config(machine.read(CONFIG), CONFIG)).run_dir
    except AtelierError:
        return RUN_FOLDER


def _present_plan(machine: Host, journal: Journal) -> Plan:
    if not machine.path(CONFIG).exists():
        raise InvalidRequestError(
            f"this host is none yet: there is no {CONFIG}", code="not_a_host", hint="atelier host init"
        )
    return choose_plan(machine, journal, None, None)


def require_root() -> None:
    """Raises AccessDeniedError (``not_root``)."""
    if os.geteuid() != 0:
        raise AccessDeniedError(
            "atelier host changes the machine itself, and that is root's alone",
            code="not_root",
            hint=f"sudo atelier host {' '.join(sys.argv[1:])}".rstrip(),
        )


def become(*words: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(words[0], list(words))  # noqa: S606


def _ask(question: str, default: str) -> str:
    return click.prompt(question, default=default, err=True, show_default=bool(default))


def printable(text: str) -> str:
    """What a guest wrote obeys no terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def say(words: str) -> None:
    sys.stderr.write(words + "\n")
    sys.stderr.flush()


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")


def print_json(document: object) -> None:
    print_line(json.dumps(document, indent=2, ensure_ascii=False))


def print_error(error: AtelierError) -> None:
    say(f"error: {printable(error.message)}")
    for line in error.hint.splitlines():
        say(f"hint: {printable(line)}")
