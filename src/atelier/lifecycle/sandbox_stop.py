"""The saga that stops a running sandbox: its guest shuts down in order, then all goes but its name, slot and disk.

Built by ``sagas``. The shutdown is its pivot: from there on there is only forward. A guest that does not end in time is
cut off, and the row says so. Inputs: ``reason`` (a StopReason), ``grace_seconds``, ``then_start`` (it is a restart: the
saga that starts the sandbox again is written in the same transaction that ends this one).
"""

from __future__ import annotations

from collections.abc import Callable

from atelier.db.engine import Connection
from atelier.lifecycle.saga_ends import SagaEnds
from atelier.lifecycle.sandbox_steps import SandboxSteps
from atelier.model.states import SandboxState, StopReason
from atelier.saga.definition import Recovery, SagaDefinition
from atelier.saga.log import SagaRecord

KIND = "sandbox_stop"


def define_stop(steps: SandboxSteps, begin_start: Callable[[Connection, str], None]) -> SagaDefinition[Connection]:
    """``begin_start(connection, sandbox_id)`` writes state and saga of a start into the transaction."""
    ends = SagaEnds(steps.sandboxes, steps.transitions, steps.consoles, "stop", "being stopped")
    shutdown = steps.shut_guest_down()

    def end_stopped(connection: Connection, record: SagaRecord) -> None:
        reason = StopReason(record.inputs.get("reason", StopReason.REQUESTED))
        if record.outputs[shutdown.name]["forced"]:
            reason = StopReason.FORCED
        steps.transitions.apply(connection, record.subject_id, SandboxState.STOPPED, stop_reason=reason)
        steps.sandboxes.set_vmm_process(connection, record.subject_id, None)
        ends.forget(connection, record)
        if record.inputs.get("then_start"):
            begin_start(connection, record.subject_id)

    return SagaDefinition(
        KIND,
        (shutdown, *steps.releasing()),
        pivot=shutdown.name,
        recovery=Recovery.RESUME,
        on_completed=end_stopped,
        on_unwound=ends.forget,
        on_stuck=ends.say_stuck,
    )
