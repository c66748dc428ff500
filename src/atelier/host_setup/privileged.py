"""``atelier-privileged <storage|vmm>``: does for the manager what only root can do, and nothing else.

Started through sudo by ``host.privilege``, once for each group of verbs; a line of JSON there, a line back, in order. It
trusts nothing of what it is told: what it may touch stands in root's own settings, names are built here, and each verb
checks its arguments. Nothing is done for a client that has gone, and nothing at the same time as another helper of the same
group does something, or as a command of LVM's goes on that a killed helper had begun: so what a dead manager has asked for
is done when its successor looks, or never.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from atelier.host.file_lock import hold_opened, open_lock
from atelier.host.peers import has_gone
from atelier.host.privilege import GROUPS, LINE_MAX_BYTES, PROTOCOL_VERSION
from atelier.host_setup.root_settings import ROOT_SETTINGS, RootSettings, read_root_settings
from atelier.model.errors import AtelierError, InvalidRequestError

Request = dict[str, Any]
Verb = Callable[[Request], Awaitable[dict[str, Any]]]

_LOCKS = Path("/run/atelier-privileged")


def main(arguments: list[str] | None = None, settings_file: Path = ROOT_SETTINGS, locks: Path = _LOCKS) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 1 or words[0] not in GROUPS:
        _say(f"usage: atelier-privileged {'|'.join(GROUPS)}")
        return 2
    if os.geteuid() != 0:
        _say("this is root's program: sudo starts it")
        return 1
    os.umask(0o077)
    os.chdir("/")
    try:
        settings = read_root_settings(settings_file)
        locks.mkdir(mode=0o700, exist_ok=True)
        lock = open_lock(locks / words[0])
        verbs = _verbs_of(words[0], settings, lock)
    except (AtelierError, OSError) as error:
        _say(str(error))
        return 1
    with contextlib.suppress(BrokenPipeError):
        asyncio.run(_serve(verbs, settings, lock, sys.stdin.buffer, sys.stdout.buffer))
    return 0


def _verbs_of(group: str, settings: RootSettings, lock: int) -> Mapping[str, Verb]:
    """Only what the group needs is imported: a start costs time, and code that is not there has no mistakes."""
    match group:
        case "storage":
            from atelier.host_setup.storage_verbs import StorageVerbs

            return StorageVerbs(settings, lock=lock).verbs
        case _:
            from atelier.host_setup.vmm_verbs import vmm_verbs

            return vmm_verbs(settings)


async def _serve(
    verbs: Mapping[str, Verb], settings: RootSettings, lock: int, requests: BinaryIO, answers: BinaryIO
) -> None:
    _write(answers, {"protocol": PROTOCOL_VERSION, "installation_id": settings.installation_id})
    while line := requests.readline(LINE_MAX_BYTES):
        # Nothing else is to be done meanwhile: as for the requests, the loop may wait.
        with hold_opened(lock):
            if has_gone(requests.fileno()):
                return
            answer = await _answer(verbs, line)
        _write(answers, answer)


async def _answer(verbs: Mapping[str, Verb], line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise TypeError("the request is no JSON object")
        verb = verbs[str(cast(Request, request).pop("verb"))]
        return await verb(cast(Request, request))
    except AtelierError as error:
        return _failure(error)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        return _failure(InvalidRequestError(f"the privileged helper refuses this: {error!r}", code="privilege_refused"))
    except Exception as error:
        traceback.print_exc()
        return _failure(AtelierError(f"the privileged helper failed: {error!r}", hint="the manager's log says more"))


def _failure(error: AtelierError) -> dict[str, Any]:
    return {
        "error": {
            "kind": type(error).__name__,
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
        }
    }


def _write(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


def _say(words: str) -> None:
    print(f"atelier-privileged: {words}", file=sys.stderr, flush=True)  # noqa: T201  it has no other way to tell


if __name__ == "__main__":
    sys.exit(main())
