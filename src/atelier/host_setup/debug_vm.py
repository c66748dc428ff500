"""``atelier host debug-vm``: everything on this host that belongs to one sandbox. Changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

from atelier.config.settings import Settings
from atelier.host.files import read_tail
from atelier.host_setup.host import Host
from atelier.host_setup.root_settings import ROOT_SETTINGS
from atelier.model.errors import InvalidRequestError, NotFoundError
from atelier.model.ids import is_sandbox_id
from atelier.model.layout import DataLayout, RunLayout

_CONSOLE_BYTES = 4000
_STATUS_LINES = ("Uid", "State", "VmRSS", "Threads", "NoNewPrivs", "Seccomp")


async def describe_vm(host: Host, settings: Settings, sandbox_id: str) -> list[tuple[str, str]]:
    """(what, as text) of what there is. Raises InvalidRequestError, NotFoundError where nothing bears that id."""
    if not is_sandbox_id(sandbox_id):
        raise InvalidRequestError(
            f"{sandbox_id!r} is no id of a sandbox", code="invalid_id", hint="12 characters, as atelier ls --json shows"
        )
    run, data = RunLayout(settings.run_dir), DataLayout(settings.data_dir)
    found: list[tuple[str, str]] = []
    for pid in _processes_with(host, sandbox_id):
        found += _describe_process(host, pid)
    found += [
        ("link", line.strip())
        for line in (await host.ask("ip", "-brief", "link") or "").splitlines()
        if re.match(rf"at\w{{4}}{sandbox_id[:8]}\b", line)
    ]
    if group := settings.production.volume_group:
        listed = await host.ask("lvs", "--noheadings", "--options", "lv_name,lv_size,data_percent,lv_attr", group) or ""
        found += [("volume", " ".join(line.split())) for line in listed.splitlines() if sandbox_id in line]
    for what, folder in (
        ("run folder", run.vmm_directory(sandbox_id)),
        ("jail", settings.production.jails_dir),
        ("volumes", data.volumes),
        ("channel", run.channels),
    ):
        found += [(what, str(each)) for each in _files_of(host.path(folder), sandbox_id)]
    console = next(iter(host.path(data.consoles).glob(f"{sandbox_id}*")), None)
    live = host.path(run.vmm_directory(sandbox_id)) / "console.log"
    if shown := live if live.exists() else console:
        found.append(("console", read_tail(shown, _CONSOLE_BYTES).decode(errors="backslashreplace")))
    if not found:
        raise NotFoundError(
            f"nothing on this host belongs to a sandbox {sandbox_id}",
            code="sandbox_not_found",
            hint=f"atelier ls shows them; {ROOT_SETTINGS} says which installation this is",
        )
    return found


def _processes_with(host: Host, sandbox_id: str) -> list[int]:
    """VMMs by a word of their arguments: no other process of the host's has to bear the id in one."""
    found: list[int] = []
    for folder in host.path("/proc").glob("[0-9]*"):
        words = host.read(f"/proc/{folder.name}/cmdline").split("\0")
        program = Path(words[0]).name
        if program.startswith(("qemu-system", "firecracker", "jailer")) and any(
            sandbox_id in word for word in words[1:]
        ):
            found.append(int(folder.name))
    return sorted(found)


def _describe_process(host: Host, pid: int) -> list[tuple[str, str]]:
    status = host.read(f"/proc/{pid}/status").splitlines()
    facts = [" ".join(line.split()) for line in status if line.split(":")[0] in _STATUS_LINES]
    return [
        ("process", f"{pid}: {host.read(f'/proc/{pid}/cmdline').replace(chr(0), ' ').strip()}"),
        ("", "; ".join(facts)),
        ("control group", host.read(f"/proc/{pid}/cgroup").strip()),
    ]


def _files_of(folder: Path, sandbox_id: str) -> list[Path]:
    if not folder.is_dir():
        return []
    if sandbox_id in folder.name:
        return [folder, *sorted(folder.iterdir())]
    return sorted(each for each in folder.rglob(f"*{sandbox_id}*"))
