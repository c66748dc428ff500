"""The saga that boots a stopped or failed sandbox from its own disk, under the same name, token and machine-id.

Built by ``sagas``. It acquires what the creation acquires, in the same order; what it finds present it takes. When it
fails, its unwinding keeps slot and disk, unless it was to make them itself (input ``fresh``: the creation had failed and
left none).
"""

from __future__ import annotations

from atelier.db.engine import Connection
from atelier.lifecycle.saga_ends import SagaEnds, failure_of
from atelier.lifecycle.sandbox_steps import SandboxSteps
from atelier.saga.definition import Recovery, SagaDefinition
from atelier.saga.log import SagaRecord

KIND = "sandbox_start"


def define_start(steps: SandboxSteps) -> SagaDefinition[Connection]:
    ends = SagaEnds(steps.sandboxes, steps.transitions, steps.consoles, "start", "being started")

    def end_running(connection: Connection, record: SagaRecord) -> None:
        ends.run(connection, record)
        ends.forget(connection, record)

    def end_unwound(connection: Connection, record: SagaRecord) -> None:
        if not record.unwind_requested:
            if record.inputs.get("fresh"):
                steps.sandboxes.set_holds_volume(connection, record.subject_id, False)
                steps.sandboxes.release_lease(connection, record.subject_id)
            ends.fail(connection, record.subject_id, failure_of(record.failure))
        ends.forget(connection, record)

    return SagaDefinition(
        KIND,
        steps.acquiring(find=steps.find_disk(), keeps_disk=True),
        recovery=Recovery.RESUME,
        on_failure=ends.describe_failure,
        on_completed=end_running,
        on_unwound=end_unwound,
        on_stuck=ends.say_stuck,
    )
