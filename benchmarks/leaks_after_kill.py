"""``leaks_after_kill``: processes, sockets, files, volumes and rows that are left when manager and gateway were killed under
load, started again and told to destroy all their sandboxes, which are real ones. None may be."""

from __future__ import annotations

from tests.kill_under_load import Moment, create_witnesses, kill_again_and_again
from tests.leftovers import count_kinds, leftovers
from tests.running_manager import LocalInstallation

from benchmarks.figure import Figure, at_most
from benchmarks.progress import say
from benchmarks.stage import Stage

CREATES = 12
MOMENTS = (Moment(6), Moment(CREATES, 0.7), Moment(CREATES, 3), Moment(CREATES, 8))


def measure(stage: Stage) -> list[Figure]:
    # Builds the images if they are not there yet: not under load.
    say(f"leaks_after_kill: {stage.ingredients.accelerator}")
    folder = stage.folder / "leaks"
    folder.mkdir(mode=0o711)
    installation = LocalInstallation(folder)
    try:
        victim, *witnesses = create_witnesses(installation, 3)
        kill_again_and_again(installation, witnesses, [victim.sandbox_id], CREATES, MOMENTS)
        left = leftovers(folder)
    finally:
        if installation.manager.process.poll() is not None:
            installation.start()
        installation.call("POST", "/host/shutdown", {"sandboxes": "destroy"})
        installation.manager.process.wait(300)
    for each in left:
        say(f"leaks_after_kill: {each}")
    say(f"leaks_after_kill: {count_kinds(left)}")
    return [Figure("leaks_after_kill", len(left), "things", target=at_most(0, on="value"))]
