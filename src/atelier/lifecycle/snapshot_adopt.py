"""The saga that makes a snapshot of a template in the cache, in the place of ``snapshot_bake``; unwinding deletes it.

Begun by ``shared_templates``. Inputs: ``entry`` (the folder in the cache), ``image`` and ``tools`` (the files that its
machine is made over here), ``checksums`` (of memory, state and disk). The files are held first and read then, so that
none of them can go or change in between unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atelier.db.engine import Connection
from atelier.lifecycle.snapshot_bake import BakeSteps, define_making
from atelier.lifecycle.snapshot_files import MEMORY, STATE, damaged
from atelier.lifecycle.template_cache import DISK, image_in
from atelier.model.machine import DiskFile
from atelier.saga.definition import SagaDefinition, Step, StepContext

KIND = "snapshot_adopt"


@dataclass(frozen=True, slots=True)
class AdoptSteps:
    bake: BakeSteps

    async def keep_files(self, context: StepContext) -> dict[str, Any]:
        files = self.bake.files
        await files.prepare(context.subject_id, Path(context.inputs["tools"]))
        await files.keep_image(context.subject_id, image_in(Path(context.inputs["entry"])))
        return {}

    async def keep_disk(self, context: StepContext) -> dict[str, Any]:
        source, base = Path(context.inputs["entry"]) / DISK, DiskFile(Path(context.inputs["image"]), "raw")
        checksum = context.inputs["checksums"][DISK]
        made = await self.bake.storage.import_snapshot_disk(context.subject_id, source, base, checksum)
        return {"used_bytes": made.used_bytes}

    async def verify(self, context: StepContext) -> dict[str, Any]:
        """As ``BakeSteps.measure``. Raises HostError (``snapshot_damaged``) for other checksums than were written."""
        measured = await self.bake.measure(context)
        for name in (MEMORY, STATE):
            if measured["checksums"][name] != context.inputs["checksums"][name]:
                raise damaged(Path(context.inputs["entry"]) / name, "its checksum is another")
        return measured


def define_adopt(adopt: AdoptSteps) -> SagaDefinition[Connection]:
    return define_making(
        adopt.bake,
        KIND,
        (
            Step("files", adopt.keep_files, adopt.bake.remove_taken),
            Step("disk", adopt.keep_disk, adopt.bake.remove_disk),
            Step("checksums", adopt.verify),
        ),
    )
