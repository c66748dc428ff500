"""The saga that pauses a running sandbox: its machine goes to disk whole, then all goes but its name, slot and disk.

Built by ``sandboxes``. Until the memory is on disk a failure wakes the guest again, as though nothing had been; ending the
machine is the pivot.
"""

from __future__ import annotations

from atelier.db.engine import Connection
from atelier.lifecycle.memory_steps import MemorySteps
from atelier.lifecycle.saga_ends import SagaEnds, failure_of
from atelier.model.states import SandboxState
from atelier.saga.definition import Recovery, SagaDefinition
from atelier.saga.log import SagaRecord

KIND = "sandbox_pause"


def define_pause(memory: MemorySteps) -> SagaDefinition[Connection]:
    steps = memory.steps
    ends = SagaEnds(steps.sandboxes, steps.transitions, steps.consoles, "pause", "being paused", fails=False)
    releasing = steps.releasing()

    def end_paused(connection: Connection, record: SagaRecord) -> None:
        steps.transitions.apply(connection, record.subject_id, SandboxState.PAUSED)
        steps.sandboxes.set_vmm_process(connection, record.subject_id, None)
        ends.forget(connection, record)

    def end_unwound(connection: Connection, record: SagaRecord) -> None:
        """It runs on, and says why it could not be paused."""
        if not record.unwind_requested:
            memory.machines.set_saved_memory(connection, record.subject_id, None)
            steps.transitions.apply(connection, record.subject_id, SandboxState.RUNNING, failure_of(record.failure))
        ends.forget(connection, record)

    return SagaDefinition(
        KIND,
        (memory.quiesce(), memory.save(), *releasing, memory.checksum()),
        pivot=releasing[0].name,
        recovery=Recovery.RESUME,
        on_failure=ends.describe_failure,
        on_completed=end_paused,
        on_unwound=end_unwound,
        on_stuck=ends.say_stuck,
    )
