"""The saga that creates a sandbox, and whose unwinding destroys it: there is no second list.

Built by ``sagas``. The order of its steps is pinned by a test. Its record stays in the log for as long as the sandbox
lives: destroying asks for its unwinding.
"""

from __future__ import annotations

from typing import Any

from atelier.db.engine import Connection
from atelier.lifecycle.saga_ends import SagaEnds, failure_of
from atelier.lifecycle.sandbox_steps import SandboxSteps
from atelier.lifecycle.warming import warm_up
from atelier.model.sandbox import SandboxPurpose
from atelier.saga.definition import Recovery, SagaDefinition, Step, StepContext
from atelier.saga.log import SagaRecord, SagaStatus

KIND = "sandbox_create"


def create_saga_id(sandbox_id: str) -> str:
    """A sandbox is created once, so its saga's id needs no place of its own."""
    return f"{KIND}/{sandbox_id}"


def has_booted(record: SagaRecord) -> bool:
    """Whether a creation ended well with a machine that had to boot."""
    well = record.kind == KIND and record.status is SagaStatus.COMPLETED
    return well and "restore" not in record.outputs["image"]


def define_create(steps: SandboxSteps) -> SagaDefinition[Connection]:
    ends = SagaEnds(steps.sandboxes, steps.transitions, steps.consoles, "create", "being created")

    async def warm_pooled(context: StepContext) -> dict[str, Any]:
        """By all that giving it away and its first use will take, so that neither is the first of its kind."""
        if steps.sandbox(context).purpose is SandboxPurpose.POOL:
            await steps.while_machine_runs(context, warm_up(steps.guests, context.subject_id))
            await steps.give_new_name(context)
        return {}

    def end_unwound(connection: Connection, record: SagaRecord) -> None:
        if record.unwind_requested:
            ends.remove(connection, record)
            return
        steps.sandboxes.set_holds_volume(connection, record.subject_id, False)
        steps.sandboxes.release_lease(connection, record.subject_id)
        ends.fail(connection, record.subject_id, failure_of(record.failure))

    return SagaDefinition(
        KIND,
        steps.acquiring(find=steps.find_image(), keeps_disk=False, prepare=(Step("guest_warm", warm_pooled),)),
        recovery=Recovery.RESUME,
        on_failure=ends.describe_failure,
        on_completed=ends.run,
        on_unwound=end_unwound,
        on_stuck=ends.say_stuck,
    )
