"""The saga that resumes a paused sandbox: its machine goes on where it stood, under the same name, token and address.

Built by ``sandboxes``. It acquires what a start acquires, in the same order, but the machine is restored from the
saved memory. When that fails before the memory is given up, the sandbox stays paused and can be resumed later; after
that its guest has run, so only its disk is left.
"""

from __future__ import annotations

from atelier.db.engine import Connection
from atelier.lifecycle.memory_steps import MemorySteps
from atelier.lifecycle.saga_ends import SagaEnds, failure_of
from atelier.saga.definition import Recovery, SagaDefinition
from atelier.saga.log import SagaRecord

KIND = "sandbox_resume"


def define_resume(memory: MemorySteps) -> SagaDefinition[Connection]:
    steps = memory.steps
    ends = SagaEnds(steps.sandboxes, steps.transitions, steps.consoles, "resume", "being resumed", fails=False)

    def end_running(connection: Connection, record: SagaRecord) -> None:
        ends.run(connection, record)
        ends.forget(connection, record)

    def end_unwound(connection: Connection, record: SagaRecord) -> None:
        if not record.unwind_requested:
            failure = failure_of(record.failure)
            if memory.machines.find_saved_memory(connection, record.subject_id) is None:
                ends.fail(connection, record.subject_id, failure)
            else:
                ends.pause_again(connection, record.subject_id, failure)
        ends.forget(connection, record)

    return SagaDefinition(
        KIND,
        steps.acquiring(find=memory.find_saved(), keeps_disk=True, spend_memory=memory.spend()),
        recovery=Recovery.RESUME,
        on_failure=ends.describe_failure,
        on_completed=end_running,
        on_unwound=end_unwound,
        on_stuck=ends.say_stuck,
    )
