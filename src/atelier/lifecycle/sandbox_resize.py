"""The saga that grows a sandbox's disk to the size that its row promises, live or while it is stopped.

Built by ``sagas``. The row is changed, and the host's room for it taken, in the transaction that begins the saga. A disk
cannot shrink, so the first step is the pivot.
"""

from __future__ import annotations

from atelier.db.engine import Connection
from atelier.lifecycle.saga_ends import SagaEnds
from atelier.lifecycle.sandbox_steps import SandboxSteps
from atelier.saga.definition import Recovery, SagaDefinition
from atelier.saga.log import SagaRecord

KIND = "sandbox_resize"


def define_resize(steps: SandboxSteps) -> SagaDefinition[Connection]:
    ends = SagaEnds(steps.sandboxes, steps.transitions, steps.consoles, "resize", "being resized")
    growing = steps.grow_disk()

    def end_resized(connection: Connection, record: SagaRecord) -> None:
        steps.transitions.tell_resized(connection, record.subject_id)
        ends.forget(connection, record)

    return SagaDefinition(
        KIND,
        growing,
        pivot=growing[0].name,
        recovery=Recovery.RESUME,
        on_completed=end_resized,
        on_unwound=ends.forget,
        on_stuck=ends.say_stuck,
    )
