"""qcow2 files made, grown and merged by ``qemu-img``. Whoever calls has checked what their headers name.

Called by storage and by the manager's backup. A file that a VMM could still write to is never opened by ``qemu-img``,
which believes what is written in it: it is copied first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from atelier.host import command
from atelier.host.disk_files import find_backing, set_backing_file
from atelier.host.file_copies import copy_file
from atelier.host.files import disk_full, disk_full_as_error
from atelier.host.threads import run_in_thread
from atelier.model.errors import CommandError, HostError
from atelier.model.machine import DiskFile

_MERGE_TIMEOUT_SECONDS = 4 * 3600.0


async def create_overlay(path: Path, backing: DiskFile, size_bytes: int, *, doing: str) -> None:
    """Make an empty overlay of mode 0600, in the place of what is there.

    ``doing`` completes "no space left while ...". A failure leaves nothing. Raises DiskFullError, HostError.
    """
    try:
        with disk_full_as_error(doing):
            path.unlink(missing_ok=True)
            # Made here, so that its mode is right from the first instant.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # -u: do not open what is below; the size is known and stated.
        overlay = ["create", "-q", "-u", "-f", "qcow2", "-F", backing.format, "-b", str(backing.path)]
        try:
            # Open, not by its name: one that comes to it after this process's death must not make the file again.
            arguments = [*overlay, f"/proc/self/fd/{descriptor}", str(size_bytes)]
            await _run_qemu_img(arguments, doing, pass_descriptors=[descriptor])
        finally:
            os.close(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


async def grow_image(path: Path, size_bytes: int, *, doing: str) -> None:
    await _run_qemu_img(["resize", "-q", "-f", "qcow2", str(path), str(size_bytes)], doing)


async def merge_copies(overlays: Sequence[DiskFile], below: Sequence[DiskFile], path: Path, *, doing: str) -> None:
    """Make ``path`` (0600, on disk), in the place of what is there: one qcow2 file over the last one of ``below``, with
    the content of the whole chain.

    ``overlays``: qcow2 files, nearest first, which stand over one another as they say; they are copied. ``below``: the
    same content as what the last overlay stands over, not written by anybody: it is named, where it may lie elsewhere
    than the overlay says, and read. Without a file between the one overlay and the last of ``below`` this is a copy.
    A failure leaves nothing. Raises DiskFullError, HostError (``disk_file_damaged``: an overlay changed its header).
    """
    copies = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, len(overlays)))]
    try:
        with disk_full_as_error(doing):
            for overlay, copy in zip(overlays, copies, strict=True):
                copy.unlink(missing_ok=True)
                await _copy(overlay.path, copy)
        over = [*(DiskFile(copy, "qcow2") for copy in copies[1:]), below[0]]
        for copy, expected in zip(copies, over, strict=True):
            # Looked at again: the original may have been written to after it was checked. A name would be replaced.
            found = find_backing(DiskFile(copy, "qcow2"))
            if found is None or found.format != expected.format:
                raise HostError(
                    f"the header of {overlays[0].path}, or of what is below it, changed", code="disk_file_damaged"
                )
            set_backing_file(copy, expected.path)
        base = below[-1]
        if len(copies) > 1 or len(below) > 1:
            # Takes in what differs from ``base``, then stands over that. ``convert -B`` would not do: it takes what is
            # in the uppermost file only.
            rebase = ["rebase", "-q", "-f", "qcow2", "-F", base.format, "-b", str(base.path), str(path)]
            await _run_qemu_img(rebase, doing, timeout_seconds=_MERGE_TIMEOUT_SECONDS)
            with disk_full_as_error(doing):
                _synchronize(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        for copy in copies[1:]:
            copy.unlink(missing_ok=True)


async def _copy(source: Path, target: Path) -> None:
    await run_in_thread(lambda given_up: copy_file(source, target, mode=0o600, given_up=given_up))


async def _run_qemu_img(
    arguments: list[str], doing: str, *, pass_descriptors: Sequence[int] = (), timeout_seconds: float = 60.0
) -> None:
    try:
        await command.run(
            ["qemu-img", *arguments],
            environment={"LC_ALL": "C"},
            pass_descriptors=pass_descriptors,
            package_hint="qemu-utils",
            timeout_seconds=timeout_seconds,
        )
    except CommandError as error:
        if "No space left on device" in error.message or "Disk quota exceeded" in error.message:
            raise disk_full(doing) from error
        raise


def _synchronize(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
