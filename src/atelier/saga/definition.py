"""What a saga is: a straight list of steps, in the order in which they acquire; unwinding goes backwards.

Called by ``lifecycle``, which writes the definitions, and by the executor, which reads them. A definition holds no
state of a running saga: everything that must outlive the process stands in the log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeAlias

from atelier.saga.log import SagaRecord, TransactionT

JsonObject: TypeAlias = dict[str, Any]
"""Something that ``json.dumps`` takes and gives back unchanged."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step may know. ``outputs`` holds, by step name, what ended steps returned; a step that was interrupted
    has none, also in its own undo. ``unwind_requested``: the subject is to go away altogether, where an unwinding
    without it only takes back a failure."""

    saga_id: str
    subject_id: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, JsonObject]
    unwind_requested: bool


@dataclass(frozen=True, slots=True)
class Step(Generic[TransactionT]):
    """Acquires one resource. ``do`` means "ensure present", ``undo`` "ensure absent": both may run twice, and ``undo``
    may run after a ``do`` that was cut off anywhere, or never ran.

    ``commit`` writes what is worth keeping outside the log, in the same transaction as the output; it runs in the
    log's thread and may use nothing but the transaction.
    """

    name: str
    do: Callable[[StepContext], Awaitable[JsonObject]]
    undo: Callable[[StepContext], Awaitable[None]] | None = None
    commit: Callable[[TransactionT, SagaRecord, JsonObject], None] | None = None


class Recovery(Enum):
    """What a start does with a saga that the last process left half-way forward, before its pivot.

    ``RESUME`` runs the list again from its beginning: each ``do`` ensures presence, so what stands is found and what a
    reboot of the host took away comes back. ``UNWIND`` takes back what was acquired. Past the pivot both go on from
    the step that was interrupted.
    """

    RESUME = "resume"
    UNWIND = "unwind"


RecordHook = Callable[[TransactionT, SagaRecord], None]
"""Runs inside the transaction that writes the record, in the log's thread; raising rolls that transaction back."""


@dataclass(frozen=True, slots=True)
class SagaDefinition(Generic[TransactionT]):
    """``kind`` stands in the log. ``pivot`` names the step that cannot be undone: from its beginning on the saga only
    goes forward (a requested unwinding still wins).

    ``on_failure`` describes the error that makes the saga unwind, while everything it acquired still stands; what it
    returns becomes ``SagaRecord.failure``. The other hooks join the transaction in which the saga ends or gets stuck.
    """

    kind: str
    steps: tuple[Step[TransactionT], ...]
    pivot: str | None = None
    recovery: Recovery = Recovery.UNWIND
    on_failure: Callable[[StepContext, Exception], Awaitable[JsonObject]] | None = None
    on_completed: RecordHook[TransactionT] | None = None
    on_unwound: RecordHook[TransactionT] | None = None
    on_stuck: RecordHook[TransactionT] | None = None

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"saga {self.kind}: steps need distinct names and there must be one")
        if self.pivot is not None and self.pivot not in names:
            raise ValueError(f"saga {self.kind}: the pivot {self.pivot} is none of its steps")

    def index(self, step_name: str) -> int:
        """Position of a step; raises UnknownStepError for a name from another version of the definition."""
        for position, step in enumerate(self.steps):
            if step.name == step_name:
                return position
        raise UnknownStepError(f"saga {self.kind} has no step {step_name!r}")

    def further(self, one: str, other: str) -> str:
        """That one of two steps which comes later in the list."""
        return max(one, other, key=self.index)

    def is_past_pivot(self, step_name: str) -> bool:
        return self.pivot is not None and self.index(step_name) >= self.index(self.pivot)


class UnknownStepError(Exception):
    """The log names a step that this version of the definition does not have."""


class SagaInterruptedError(Exception):
    """Given to ``on_failure`` when the process ended in the middle of a saga that a start unwinds."""
