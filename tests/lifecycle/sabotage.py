"""What the sweeps over every saga share: where a saga can be hurt, how it is begun, and what a sandbox may hold.

Sagas are found through the lifecycle (``SandboxLifecycle.sagas``), the way to their beginning through
``operations.OPERATIONS``: a new saga is swept without an edit here, unless it wants an argument nobody has met before.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from atelier.lifecycle import operations, sandbox_claim, sandbox_create, sandbox_pause, sandbox_resume
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.sandbox import Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.states import SandboxState
from atelier.saga.definition import SagaDefinition, Step

NAME = "one"
SAMPLES: dict[str, Any] = {"disk_mib": 8192}
"""Arguments of operations, by parameter name."""
HOLDS = {
    SandboxState.RUNNING: {"slot", "volume", "run", "channel", "vmm"},
    SandboxState.STOPPED: {"slot", "volume"},
    SandboxState.PAUSED: {"slot", "volume", "memory"},
}
"""What a settled sandbox holds; a failed one holds what a stopped one does, or nothing at all."""


@dataclass(frozen=True)
class Place:
    """A moment in a saga: before or after a step's ``do`` or ``undo``."""

    kind: str
    step: str
    call: str
    moment: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.step}:{self.call}:{self.moment}"

    @classmethod
    def parse(cls, text: str) -> Place:
        return cls(*text.split(":"))


def places(sagas: Iterable[SagaDefinition[Any]], call: str) -> list[Place]:
    return [
        Place(saga.kind, step.name, call, moment)
        for saga in sagas
        for step in saga.steps
        if call == "do" or step.undo is not None
        for moment in ("before", "after")
    ]


def last_that_unwinds(saga: SagaDefinition[Any]) -> str:
    """The last step whose failure is taken back."""
    return saga.steps[-1 if saga.pivot is None else saga.index(saga.pivot) - 1].name


def end_of_unwinding(place: Place, saga: SagaDefinition[Any]) -> SandboxState:
    """Where a failure at ``place`` leaves a sandbox."""
    if saga.kind == sandbox_pause.KIND:
        return SandboxState.RUNNING
    # Once its memory is given up there is only the disk left.
    spent = [step.name for step in saga.steps].index("memory_spent") if saga.kind == sandbox_resume.KIND else -1
    position = saga.index(place.step)
    if position < spent or (position == spent and place.call == "do"):
        return SandboxState.PAUSED
    return SandboxState.FAILED


Disturbance = Callable[[Place], Awaitable[None]]


def disturb(lifecycle: SandboxLifecycle, disturbance: Disturbance, *, times: int = 1) -> None:
    """Have ``disturbance`` called at every place of every saga; and each do and undo run ``times`` times over."""

    def wrapped(kind: str, step: Step[Any]) -> Step[Any]:
        async def do(context: Any) -> dict[str, Any]:
            await disturbance(Place(kind, step.name, "do", "before"))
            for _ in range(times - 1):
                await step.do(context)
            output = await step.do(context)
            await disturbance(Place(kind, step.name, "do", "after"))
            return output

        async def undo(context: Any) -> None:
            assert step.undo is not None
            await disturbance(Place(kind, step.name, "undo", "before"))
            for _ in range(times):
                await step.undo(context)
            await disturbance(Place(kind, step.name, "undo", "after"))

        return replace(step, do=do, undo=undo if step.undo is not None else None)

    definitions = lifecycle._executor._definitions
    for kind, saga in definitions.items():
        definitions[kind] = replace(saga, steps=tuple(wrapped(kind, step) for step in saga.steps))


async def bring_about(lifecycle: SandboxLifecycle, kind: str) -> str:
    """Begin the saga of this kind with a sandbox that is brought where it can begin; returns the sandbox's id."""
    if kind == sandbox_claim.KIND:
        return await _claim(lifecycle)
    sandbox = await lifecycle.start_create(NAME, SandboxSpec())
    if kind == sandbox_create.KIND:
        return sandbox.id
    settled = await lifecycle.wait_settled(sandbox.id, 60)
    assert settled is not None
    for operation in way_to(kind, settled.state):
        await begin(lifecycle, operation, sandbox.id)
        if operation.kind != kind:
            await lifecycle.wait_settled(sandbox.id, 60)
    return sandbox.id


async def _claim(lifecycle: SandboxLifecycle) -> str:
    """Fill a warm pool, close it, and take the one that stands in it."""
    waiting = await lifecycle.start_create("pool-one", SandboxSpec(), purpose=SandboxPurpose.POOL)
    await lifecycle.wait_settled(waiting.id, 60)
    sandbox = await lifecycle.start_create(NAME, SandboxSpec())
    assert sandbox.id == waiting.id
    return sandbox.id


def way_to(kind: str, state: SandboxState) -> list[operations.Operation]:
    """Operations, the one of ``kind`` last, that lead there from a settled ``state``."""
    ends = {
        SandboxState.STARTING: SandboxState.RUNNING,
        SandboxState.STOPPING: SandboxState.STOPPED,
        SandboxState.PAUSING: SandboxState.PAUSED,
        SandboxState.RESUMING: SandboxState.RUNNING,
    }
    ways: list[tuple[SandboxState, list[operations.Operation]]] = [(state, [])]
    for reached, way in ways:
        for operation in operations.OPERATIONS:
            if reached not in operation.begins_from or operation in way or operation is operations.BOOT_AGAIN:
                continue
            if operation.kind == kind:
                return [*way, operation]
            if operation.meanwhile is not None:
                ways.append((ends[operation.meanwhile], [*way, operation]))
    raise AssertionError(f"no way leads to {kind}: is it among OPERATIONS?")


async def begin(lifecycle: SandboxLifecycle, operation: operations.Operation, sandbox_id: str) -> Sandbox:
    """Call the lifecycle's method of the operation, which bears the saga's name."""
    method = getattr(lifecycle, operation.kind.removeprefix("sandbox_"))
    needed = [
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.default is inspect.Parameter.empty and name != "sandbox_id"
    ]
    missing = [name for name in needed if name not in SAMPLES]
    assert not missing, f"{operation.kind} wants {missing}: add samples of them"
    return await method(sandbox_id, **{name: SAMPLES[name] for name in needed})


def check_holdings(row: Sandbox | None, held: set[str]) -> None:
    """A settled sandbox holds exactly what its state says."""
    if row is None:
        assert held == set()
    elif row.state is SandboxState.FAILED:
        assert held == ({"slot", "volume"} if row.holds_volume else set()), row.failure_message
    else:
        assert held == HOLDS[row.state]
