"""How a sandbox's sagas end: the hooks that join the log's last transaction, and the words for what went wrong.

Used by the modules that define the sagas. Hooks write the row, the event and the log; they call no driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atelier.db.engine import Connection
from atelier.db.sagas import delete_saga, delete_sagas_of
from atelier.db.sandboxes import SandboxRepository
from atelier.lifecycle.consoles import KeptConsoles
from atelier.lifecycle.errors import describe_error, interruption
from atelier.lifecycle.transitions import Failure, Transitions
from atelier.model.states import SandboxState
from atelier.saga.definition import SagaInterruptedError, StepContext
from atelier.saga.log import SagaRecord


@dataclass(frozen=True, slots=True)
class SagaEnds:
    """``doing`` is the saga's work in a sentence (``being created``), ``verb`` the one of its errors' codes.
    ``fails``: its unwinding leaves a failed sandbox, not the one that there was before."""

    sandboxes: SandboxRepository
    transitions: Transitions
    consoles: KeptConsoles
    verb: str
    doing: str
    fails: bool = True

    async def describe_failure(self, context: StepContext, error: Exception) -> dict[str, Any]:
        """Not inside a transaction: everything that was acquired still stands, the console's file too."""
        if isinstance(error, SagaInterruptedError):
            words = interruption(f"the manager ended again and again while the sandbox was {self.doing}")
        else:
            words = describe_error(error)
        return {**words, "console_tail": await self.consoles.keep(context.subject_id)}

    def run(self, connection: Connection, record: SagaRecord) -> None:
        """The sandbox runs."""
        sandbox = self.transitions.apply(connection, record.subject_id, SandboxState.RUNNING)
        self.sandboxes.set_last_active_at(connection, sandbox.id, sandbox.updated_at)

    def forget(self, connection: Connection, record: SagaRecord) -> None:
        """Only the creation's record serves on after its end: its unwinding destroys the sandbox."""
        delete_saga(connection, record.id)

    def remove(self, connection: Connection, record: SagaRecord) -> None:
        """Nothing of the sandbox is left."""
        self.transitions.end(connection, record.subject_id)
        delete_sagas_of(connection, record.subject_id)

    def pause_again(self, connection: Connection, sandbox_id: str, failure: Failure) -> None:
        """Back to ``paused``, with words for why it could not be resumed."""
        self.sandboxes.set_vmm_process(connection, sandbox_id, None)
        self.transitions.apply(connection, sandbox_id, SandboxState.PAUSED, failure)

    def fail(self, connection: Connection, sandbox_id: str, failure: Failure) -> None:
        """To ``failed``, or new words for one that is there already: its cleaning up was stuck before."""
        self.sandboxes.set_vmm_process(connection, sandbox_id, None)
        if self.sandboxes.get(connection, sandbox_id).state is SandboxState.FAILED:
            self.transitions.restate(connection, sandbox_id, failure)
        else:
            self.transitions.apply(connection, sandbox_id, SandboxState.FAILED, failure)

    def say_stuck(self, connection: Connection, record: SagaRecord) -> None:
        """What is stuck, why, and how to go on once that is mended."""
        name = self.sandboxes.get(connection, record.subject_id).name
        reason = record.error.get("message", "")
        advice = record.error.get("hint") or "remove what is in the way"
        hint = f"{advice}, then: atelier retry {name}"
        if record.unwind_requested:
            message = f"stuck while being destroyed: {reason}"
            self.transitions.mark_stuck(connection, record.subject_id, Failure("destroy_stuck", message, hint))
            return
        code = f"{self.verb}_stuck"
        if not record.failure:
            message = f"stuck while {self.doing}: {reason}"
            self.transitions.mark_stuck(connection, record.subject_id, Failure(code, message, hint))
            return
        failure = failure_of(record.failure)
        message = f"{failure.message}; and cleaning up is stuck: {reason}"
        stuck = Failure(code, message, hint, failure.console_tail)
        if self.fails:
            self.fail(connection, record.subject_id, stuck)
        self.transitions.mark_stuck(connection, record.subject_id, stuck)


def failure_of(described: dict[str, Any]) -> Failure:
    """What ``describe_failure`` wrote into the log, for the row."""
    return Failure(
        code=described.get("code", "internal"),
        message=described.get("message", "the reason is not known"),
        hint=described.get("hint", ""),
        console_tail=described.get("console_tail", ""),
    )
