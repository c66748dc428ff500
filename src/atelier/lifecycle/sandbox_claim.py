"""The saga that makes a pooled sandbox somebody's: its guest gets the new name and environment.

Built by ``composition``; begun in the transaction that takes the sandbox out of its pool. It finds the machine running, so
its list is short; where the guest does not take its new name, all that the machine holds is freed, as after a creation
that failed.
"""

from __future__ import annotations

from collections.abc import Sequence

from atelier.db.engine import Connection
from atelier.lifecycle.saga_ends import SagaEnds, failure_of
from atelier.lifecycle.sandbox_steps import SandboxSteps
from atelier.saga.definition import Recovery, SagaDefinition, Step, StepContext
from atelier.saga.log import SagaRecord

KIND = "sandbox_claim"


def define_claim(steps: SandboxSteps, create: Sequence[Step[Connection]]) -> SagaDefinition[Connection]:
    """``create``: the steps of the creation, whose undos free what a sandbox holds."""
    ends = SagaEnds(steps.sandboxes, steps.transitions, steps.consoles, "claim", "being taken from its pool")

    async def free(context: StepContext) -> None:
        for step in reversed(create):
            if step.undo is not None:
                await step.undo(context)

    def end_running(connection: Connection, record: SagaRecord) -> None:
        ends.run(connection, record)
        ends.forget(connection, record)

    def end_unwound(connection: Connection, record: SagaRecord) -> None:
        if not record.unwind_requested:
            steps.sandboxes.set_holds_volume(connection, record.subject_id, False)
            steps.sandboxes.release_lease(connection, record.subject_id)
            ends.fail(connection, record.subject_id, failure_of(record.failure))
        ends.forget(connection, record)

    return SagaDefinition(
        KIND,
        (Step("guest_identity", steps.give_new_name, free),),
        recovery=Recovery.RESUME,
        on_failure=ends.describe_failure,
        on_completed=end_running,
        on_unwound=end_unwound,
        on_stuck=ends.say_stuck,
    )
