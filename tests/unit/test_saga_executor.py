"""The saga engine on a log in memory: order, unwinding, retries, pivot, requested unwinding, recovery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from atelier.saga.definition import Recovery, SagaDefinition, SagaInterruptedError, Step, StepContext
from atelier.saga.executor import Executor
from atelier.saga.log import MemorySagaLog, SagaGoneError, SagaRecord, SagaStatus
from atelier.saga.retry import RetryPolicies, RetryPolicy

FAST = RetryPolicies(RetryPolicy(3, 0.001, 0.001), RetryPolicy(4, 0.001, 0.001), RetryPolicy(3, 0.001, 0.001))


class Flaky(Exception):
    """Counts as transient in these tests."""


@dataclass
class World:
    """What the steps acquire, what was called, and what is to fail: step -> errors still to be raised."""

    held: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    do_errors: dict[str, list[Exception]] = field(default_factory=dict)
    undo_errors: dict[str, list[Exception]] = field(default_factory=dict)
    hang_in: set[str] = field(default_factory=set)
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    seen: dict[str, StepContext] = field(default_factory=dict)
    hooks: list[tuple[str, SagaRecord]] = field(default_factory=list)
    committed: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def do(self, name: str) -> Callable[[StepContext], Awaitable[dict[str, Any]]]:
        async def run(context: StepContext) -> dict[str, Any]:
            self.calls.append(f"do {name}")
            self.seen[f"do {name}"] = context
            self.held.add(name)
            if name in self.hang_in:
                self.hanging.set()
                await asyncio.Event().wait()
            if errors := self.do_errors.get(name):
                raise errors.pop(0)
            return {"made": name}

        return run

    def undo(self, name: str) -> Callable[[StepContext], Awaitable[None]]:
        async def run(context: StepContext) -> None:
            self.calls.append(f"undo {name}")
            self.seen[f"undo {name}"] = context
            if errors := self.undo_errors.get(name):
                raise errors.pop(0)
            self.held.discard(name)

        return run

    def hook(self, name: str) -> Callable[[MemorySagaLog, SagaRecord], None]:
        return lambda transaction, record: self.hooks.append((name, record))

    def step(self, name: str, *, undoable: bool = True, commit: bool = False) -> Step[MemorySagaLog]:
        def keep(transaction: MemorySagaLog, record: SagaRecord, output: dict[str, Any]) -> None:
            self.committed.append((name, output))

        return Step(name, self.do(name), self.undo(name) if undoable else None, keep if commit else None)

    def definition(self, **changes: Any) -> SagaDefinition[MemorySagaLog]:
        steps = tuple(self.step(name) for name in "abc")
        made = SagaDefinition(
            "test",
            steps,
            on_completed=self.hook("completed"),
            on_unwound=self.hook("unwound"),
            on_stuck=self.hook("stuck"),
        )
        return replace(made, **changes)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def log() -> MemorySagaLog:
    return MemorySagaLog()


class Bench:
    """Builds executors over one log, as restarts of a process would, and closes them all."""

    def __init__(self, log: MemorySagaLog) -> None:
        self.log = log
        self.executors: list[Executor[MemorySagaLog]] = []

    def executor(self, definition: SagaDefinition[MemorySagaLog]) -> Executor[MemorySagaLog]:
        made = Executor(
            self.log,
            [definition],
            is_transient=lambda error: isinstance(error, Flaky),
            policies=FAST,
            undo_timeout_seconds=0.05,
            log_pause_seconds=0.001,
        )
        self.executors.append(made)
        return made

    async def run(self, definition: SagaDefinition[MemorySagaLog], inputs: dict[str, Any] | None = None) -> SagaRecord:
        executor = self.executor(definition)
        executor.insert(self.log, "test", "s1", "subject", inputs)
        executor.start("s1")
        record = await executor.wait("s1")
        assert record is not None
        return record


@pytest.fixture
async def bench(log: MemorySagaLog) -> AsyncIterator[Bench]:
    made = Bench(log)
    yield made
    for executor in made.executors:
        await executor.close()


async def test_steps_run_in_order_and_see_inputs_and_earlier_outputs(world: World, bench: Bench) -> None:
    record = await bench.run(world.definition(), {"size": 3})
    assert record.status is SagaStatus.COMPLETED
    assert world.calls == ["do a", "do b", "do c"]
    last = world.seen["do c"]
    assert (last.saga_id, last.subject_id, last.inputs) == ("s1", "subject", {"size": 3})
    assert last.outputs == {"a": {"made": "a"}, "b": {"made": "b"}}
    assert [name for name, _ in world.hooks] == ["completed"]


async def test_intent_is_on_the_log_before_each_do(world: World, bench: Bench, log: MemorySagaLog) -> None:
    on_log: list[tuple[str, str]] = []
    steps: list[Step[MemorySagaLog]] = []
    for name in "abc":

        async def do(context: StepContext, name: str = name) -> dict[str, Any]:
            on_log.append((name, log.records["s1"].step))
            return {}

        steps.append(Step(name, do, world.undo(name)))
    await bench.run(world.definition(steps=tuple(steps)))
    assert on_log == [("a", "a"), ("b", "b"), ("c", "c")]
    assert log.writes == 3  # the intent of a came with the insert; output and next intent share a write


async def test_no_write_between_steps_that_need_no_undo(world: World, bench: Bench, log: MemorySagaLog) -> None:
    steps = (
        world.step("image", undoable=False),
        world.step("a"),
        world.step("ready", undoable=False),
        world.step("identity", undoable=False),
        world.step("noted", undoable=False, commit=True),
    )
    record = await bench.run(world.definition(steps=steps))
    assert log.writes == 3  # image -> a, a -> ready, noted -> end; ready -> identity -> noted needs none
    assert record.outputs.keys() == {"image", "a", "ready", "identity", "noted"}
    assert world.committed == [("noted", {"made": "noted"})]


@pytest.mark.parametrize("failing", ["a", "b", "c"])
async def test_a_failing_step_unwinds_itself_and_all_before(world: World, bench: Bench, failing: str) -> None:
    world.do_errors[failing] = [ValueError("broken")]
    record = await bench.run(world.definition())
    begun = "abc"[: "abc".index(failing) + 1]
    assert record.status is SagaStatus.UNWOUND
    assert world.calls == [f"do {name}" for name in begun] + [f"undo {name}" for name in reversed(begun)]
    assert world.held == set()
    assert record.failure == {"message": "ValueError: broken"}
    assert [name for name, _ in world.hooks] == ["unwound"]
    assert failing not in world.seen[f"undo {failing}"].outputs
    assert not world.seen[f"undo {failing}"].unwind_requested


async def test_failure_in_a_step_whose_intent_was_not_written_is_on_the_log(world: World, bench: Bench) -> None:
    steps = (world.step("a"), world.step("x", undoable=False), world.step("y", undoable=False))
    world.do_errors["y"] = [ValueError("late")]
    record = await bench.run(world.definition(steps=steps))
    assert record.step == "y"
    assert world.held == {"x", "y"}  # nothing of theirs to undo


async def test_on_failure_describes_while_everything_still_stands(world: World, bench: Bench) -> None:
    async def describe(context: StepContext, error: Exception) -> dict[str, Any]:
        return {"error": str(error), "held": sorted(world.held), "outputs": sorted(context.outputs)}

    world.do_errors["b"] = [ValueError("broken")]
    record = await bench.run(world.definition(on_failure=describe))
    assert record.failure == {"error": "broken", "held": ["a", "b"], "outputs": ["a"]}


async def test_an_error_while_describing_does_not_stop_the_unwinding(world: World, bench: Bench) -> None:
    async def describe(context: StepContext, error: Exception) -> dict[str, Any]:
        raise OSError("no console")

    world.do_errors["b"] = [ValueError("broken")]
    record = await bench.run(world.definition(on_failure=describe))
    assert (record.status, record.failure) == (SagaStatus.UNWOUND, {"message": "ValueError: broken"})


async def test_transient_errors_are_tried_again(world: World, bench: Bench) -> None:
    world.do_errors["b"] = [Flaky(), Flaky()]
    record = await bench.run(world.definition())
    assert record.status is SagaStatus.COMPLETED
    assert world.calls == ["do a", "do b", "do b", "do b", "do c"]


async def test_transient_errors_end_in_unwinding_when_used_up(world: World, bench: Bench) -> None:
    world.do_errors["b"] = [Flaky("one"), Flaky("two"), Flaky("three")]
    record = await bench.run(world.definition())
    assert record.failure == {"message": "Flaky: three"}
    assert world.held == set()


async def test_undo_errors_are_tried_again(world: World, bench: Bench) -> None:
    world.do_errors["c"] = [ValueError("broken")]
    world.undo_errors["b"] = [OSError("busy"), OSError("busy")]
    record = await bench.run(world.definition())
    assert record.status is SagaStatus.UNWOUND
    assert world.calls[3:] == ["undo c", "undo b", "undo b", "undo b", "undo a"]


async def test_a_request_is_worth_one_series_of_attempts(world: World, bench: Bench) -> None:
    world.hang_in = {"c"}
    world.undo_errors["c"] = [RuntimeError("held")] * 3
    executor = bench.executor(world.definition())
    executor.insert(bench.log, "test", "s1", "subject", None)
    executor.start("s1")
    await world.hanging.wait()
    await executor.request_unwind("s1")
    record = await executor.wait("s1")
    assert record is not None
    assert record.is_stuck
    assert world.held == {"a", "b", "c"}


async def test_an_undo_that_keeps_failing_is_stuck_and_a_request_tries_again(
    world: World, bench: Bench, log: MemorySagaLog
) -> None:
    world.do_errors["c"] = [ValueError("broken")]
    world.undo_errors["b"] = [OSError("busy")] * 3
    record = await bench.run(world.definition())
    assert record.status is SagaStatus.STUCK_UNWINDING
    assert record.error == {"message": "OSError: busy"}
    assert record.failure == {"message": "ValueError: broken"}
    assert world.held == {"a", "b"}  # nothing below a stuck undo is touched
    assert [name for name, _ in world.hooks] == ["stuck"]

    await bench.executors[0].request_unwind("s1")
    ended = await bench.executors[0].wait("s1")
    assert ended is not None
    assert (ended.status, ended.error, world.held) == (SagaStatus.UNWOUND, {}, set())
    assert ended.unwind_requested


async def test_a_hanging_undo_is_an_error_too(world: World, bench: Bench) -> None:
    async def hang(context: StepContext) -> None:
        await asyncio.Event().wait()

    world.do_errors["a"] = [ValueError("broken")]
    steps = (Step("a", world.do("a"), hang),)
    record = await bench.run(world.definition(steps=steps))
    assert record.status is SagaStatus.STUCK_UNWINDING
    assert "no end within" in record.error["message"]


async def test_past_the_pivot_everything_is_tried_again(world: World, bench: Bench) -> None:
    world.do_errors["b"] = [ValueError("one"), ValueError("two")]
    world.do_errors["c"] = [ValueError("three")]
    record = await bench.run(world.definition(pivot="b"))
    assert record.status is SagaStatus.COMPLETED
    assert not any(call.startswith("undo") for call in world.calls)


async def test_past_the_pivot_used_up_is_stuck_and_recovery_goes_on_forward(world: World, bench: Bench) -> None:
    definition = world.definition(pivot="b")
    world.do_errors["c"] = [ValueError("no")] * 4
    record = await bench.run(definition)
    assert (record.status, record.step) == (SagaStatus.STUCK_RUNNING, "c")
    assert world.held == {"a", "b", "c"}
    assert [name for name, _ in world.hooks] == ["stuck"]

    again = bench.executor(definition)
    assert [found.id for found in await again.recover()] == ["s1"]
    ended = await again.wait("s1")
    assert ended is not None
    assert ended.status is SagaStatus.COMPLETED


async def test_before_the_pivot_a_failure_unwinds(world: World, bench: Bench) -> None:
    world.do_errors["a"] = [ValueError("no")]
    record = await bench.run(world.definition(pivot="b"))
    assert record.status is SagaStatus.UNWOUND


@pytest.mark.parametrize("where", ["a", "b", "c"])
async def test_a_requested_unwinding_cancels_the_step_under_way(world: World, bench: Bench, where: str) -> None:
    world.hang_in = {where}
    executor = bench.executor(world.definition())
    executor.insert(bench.log, "test", "s1", "subject")
    executor.start("s1")
    await world.hanging.wait()
    await executor.request_unwind("s1")
    record = await executor.wait("s1")
    assert record is not None
    assert (record.status, record.unwind_requested, record.failure) == (SagaStatus.UNWOUND, True, {})
    assert world.held == set()
    begun = "abc"[: "abc".index(where) + 1]
    # All of the list: another saga of the subject may have acquired what this one has not.
    assert world.calls[len(begun) :] == ["undo c", "undo b", "undo a"]
    assert world.seen[f"undo {where}"].unwind_requested


async def test_a_requested_unwinding_wins_past_the_pivot(world: World, bench: Bench) -> None:
    world.hang_in = {"c"}
    executor = bench.executor(world.definition(pivot="b"))
    executor.insert(bench.log, "test", "s1", "subject")
    executor.start("s1")
    await world.hanging.wait()
    await executor.request_unwind("s1")
    await executor.wait("s1")
    assert world.held == set()


async def test_a_requested_unwinding_ends_the_waiting_between_retries(world: World, bench: Bench) -> None:
    world.do_errors["b"] = [Flaky()] * 2
    executor = Executor(
        bench.log,
        [world.definition()],
        is_transient=lambda error: isinstance(error, Flaky),
        policies=replace(FAST, transient=RetryPolicy(3, 3600, 3600)),
    )
    bench.executors.append(executor)
    executor.insert(bench.log, "test", "s1", "subject")
    executor.start("s1")
    while "do b" not in world.calls:
        await asyncio.sleep(0)
    await executor.request_unwind("s1")
    record = await executor.wait("s1")
    assert record is not None
    assert record.status is SagaStatus.UNWOUND
    assert world.calls.count("do b") == 1


async def test_a_request_during_an_unwinding_has_all_undos_know(world: World, bench: Bench) -> None:
    reached, leave = asyncio.Event(), asyncio.Event()

    async def slow(context: StepContext) -> None:
        reached.set()
        await leave.wait()
        await world.undo("a")(context)

    world.do_errors["b"] = [ValueError("broken")]
    definition = world.definition(steps=(Step("a", world.do("a"), slow), world.step("b")))
    executor = bench.executor(definition)
    executor.insert(bench.log, "test", "s1", "subject")
    executor.start("s1")
    await reached.wait()
    assert not world.seen["undo b"].unwind_requested
    await executor.request_unwind("s1")
    leave.set()
    record = await executor.wait("s1")
    assert record is not None
    assert (record.status, record.unwind_requested) == (SagaStatus.UNWOUND, True)
    assert world.seen["undo b"].unwind_requested
    assert world.seen["undo a"].unwind_requested
    assert [(name, hooked.unwind_requested) for name, hooked in world.hooks] == [("unwound", True)]


async def test_a_completed_saga_opens_again_for_unwinding(world: World, bench: Bench) -> None:
    await bench.run(world.definition())
    await bench.executors[0].request_unwind("s1")
    record = await bench.executors[0].wait("s1")
    assert record is not None
    assert record.status is SagaStatus.UNWOUND
    assert world.calls[3:] == ["undo c", "undo b", "undo a"]
    assert world.seen["undo c"].outputs["c"] == {"made": "c"}


async def test_a_hook_of_the_request_that_refuses_changes_nothing(world: World, bench: Bench) -> None:
    before = await bench.run(world.definition())

    def refuse(transaction: MemorySagaLog, record: SagaRecord) -> None:
        raise PermissionError("not now")

    with pytest.raises(PermissionError):
        await bench.executors[0].request_unwind("s1", refuse)
    assert bench.log.find("s1") == before
    assert world.held == {"a", "b", "c"}


async def test_a_request_after_the_last_output_beats_completion(world: World, bench: Bench) -> None:
    executor = bench.executor(world.definition())

    async def request(context: StepContext) -> dict[str, Any]:
        # The mark is on the log before this step has ended; its own cancellation comes too late.
        with pytest.raises(asyncio.CancelledError):
            await executor.request_unwind("s1")
            await asyncio.sleep(0)
        return {"made": "c"}

    steps = (world.step("a"), Step("c", request, world.undo("c")))
    executor = bench.executor(world.definition(steps=steps))
    executor.insert(bench.log, "test", "s1", "subject")
    executor.start("s1")
    await executor.wait("s1")
    assert [name for name, _ in world.hooks] == ["unwound"]
    assert world.seen["undo c"].outputs["c"] == {"made": "c"}


async def test_requests_in_every_moment_leave_nothing(world: World) -> None:
    """Ask for the unwinding after 0, 1, 2, ... turns of the event loop."""
    for turns in range(40):
        world.held.clear()
        world.hooks.clear()
        log = MemorySagaLog()
        executor = Executor(log, [world.definition()], policies=FAST)
        executor.insert(log, "test", "s1", "subject")
        executor.start("s1")
        for _ in range(turns):
            await asyncio.sleep(0)
        await executor.request_unwind("s1")
        record = await executor.wait("s1")
        assert record is not None
        assert (record.status, world.held) == (SagaStatus.UNWOUND, set()), turns
        assert [name for name, _ in world.hooks][-1] == "unwound"
        await executor.close()


async def test_a_completion_hook_that_refuses_unwinds(world: World, bench: Bench) -> None:
    def refuse(transaction: MemorySagaLog, record: SagaRecord) -> None:
        raise ValueError("wrong state")

    record = await bench.run(world.definition(on_completed=refuse))
    assert (record.status, world.held) == (SagaStatus.UNWOUND, set())


async def test_an_unknown_saga_is_gone(world: World, bench: Bench) -> None:
    executor = bench.executor(world.definition())
    with pytest.raises(SagaGoneError):
        await executor.request_unwind("nope")
    assert await executor.wait("nope") is None


async def test_an_end_that_cannot_be_written_is_tried_again(world: World, bench: Bench) -> None:
    refusals = [OSError("disk full"), OSError("disk full")]

    def refuse(transaction: MemorySagaLog, record: SagaRecord) -> None:
        if refusals:
            raise refusals.pop()

    world.do_errors["b"] = [ValueError("broken")]
    record = await bench.run(world.definition(on_unwound=refuse))
    assert record.status is SagaStatus.UNWOUND
    assert not refusals


async def test_an_end_that_can_never_be_written_is_stuck(world: World, bench: Bench) -> None:
    def refuse(transaction: MemorySagaLog, record: SagaRecord) -> None:
        raise ValueError("a bug")

    world.do_errors["b"] = [ValueError("broken")]
    record = await bench.run(world.definition(on_unwound=refuse))
    assert (record.status, record.error) == (SagaStatus.STUCK_UNWINDING, {"message": "ValueError: a bug"})


# --- recovery ---------------------------------------------------------------------------------------------------


async def interrupted(world: World, bench: Bench, where: str, definition: SagaDefinition[MemorySagaLog]) -> None:
    """Leave a saga as a process does that ends in the middle of ``where``."""
    world.hang_in = {where}
    executor = bench.executor(definition)
    executor.insert(bench.log, "test", "s1", "subject")
    executor.start("s1")
    await world.hanging.wait()
    await executor.close()
    world.hang_in = set()
    assert bench.log.records["s1"].status is SagaStatus.RUNNING
    assert not any(call.startswith("undo") for call in world.calls)


@pytest.mark.parametrize("where", ["a", "b", "c"])
async def test_recovery_unwinds_by_policy(world: World, bench: Bench, where: str) -> None:
    errors: list[Exception] = []

    async def describe(context: StepContext, error: Exception) -> dict[str, Any]:
        errors.append(error)
        return {"message": "interrupted"}

    definition = world.definition(on_failure=describe)
    await interrupted(world, bench, where, definition)
    again = bench.executor(definition)
    await again.recover()
    record = await again.wait("s1")
    assert record is not None
    assert (record.status, record.failure, world.held) == (SagaStatus.UNWOUND, {"message": "interrupted"}, set())
    assert isinstance(errors[0], SagaInterruptedError)


@pytest.mark.parametrize("where", ["a", "b", "c"])
async def test_recovery_resumes_by_policy(world: World, bench: Bench, where: str) -> None:
    definition = world.definition(recovery=Recovery.RESUME)
    await interrupted(world, bench, where, definition)
    again = bench.executor(definition)
    await again.recover()
    record = await again.wait("s1")
    assert record is not None
    assert (record.status, record.recoveries) == (SagaStatus.COMPLETED, 1)
    # From the beginning: a reboot may have taken away what the first steps had made.
    assert world.calls == [f"do {name}" for name in "abc"[: "abc".index(where) + 1]] + ["do a", "do b", "do c"]
    assert record.outputs.keys() == {"a", "b", "c"}


async def test_what_was_begun_before_a_resumption_is_undone_when_that_fails_early(world: World, bench: Bench) -> None:
    definition = world.definition(recovery=Recovery.RESUME)
    await interrupted(world, bench, "c", definition)
    world.do_errors["a"] = [ValueError("broken")]
    again = bench.executor(definition)
    await again.recover()
    record = await again.wait("s1")
    assert record is not None
    assert (record.status, world.held) == (SagaStatus.UNWOUND, set())
    assert world.calls[-3:] == ["undo c", "undo b", "undo a"]


async def test_a_saga_that_ends_its_process_again_and_again_is_unwound(world: World, bench: Bench) -> None:
    definition = world.definition(recovery=Recovery.RESUME)
    await interrupted(world, bench, "b", definition)
    for _ in range(3):
        world.hanging.clear()
        executor = bench.executor(definition)
        world.hang_in = {"b"}
        await executor.recover()
        await world.hanging.wait()
        await executor.close()
    again = bench.executor(definition)
    await again.recover()
    record = await again.wait("s1")
    assert record is not None
    assert (record.status, record.recoveries, world.held) == (SagaStatus.UNWOUND, 3, set())


async def test_the_younger_saga_of_a_subject_lets_go_first(world: World, bench: Bench) -> None:
    """Destroying while another operation is under way: the operation unwinds, and only then what it builds on."""
    other = replace(world.definition(), kind="other", steps=(world.step("x"), world.step("y")))
    executor = bench.executor(world.definition())
    executor.register(other)
    executor.insert(bench.log, "test", "s1", "subject")
    executor.start("s1")
    await executor.wait("s1")
    world.hang_in = {"x"}
    executor.insert(bench.log, "other", "s2", "subject")
    executor.insert(bench.log, "other", "s3", "somebody else")
    executor.start("s2")
    await world.hanging.wait()
    await executor.request_unwind("s1")
    record = await executor.wait("s1")
    assert record is not None
    assert world.calls[-5:] == ["undo y", "undo x", "undo c", "undo b", "undo a"]
    assert {name: each.status for name, each in bench.log.records.items()} == {
        "s1": SagaStatus.UNWOUND,
        "s2": SagaStatus.UNWOUND,
        "s3": SagaStatus.RUNNING,
    }
    assert world.held == set()


async def test_recovery_too_unwinds_the_younger_first(world: World, bench: Bench) -> None:
    other = replace(world.definition(), kind="other", steps=(world.step("x"), world.step("y")))
    for saga_id, kind, step in (("s1", "test", "c"), ("s2", "other", "x")):
        record = SagaRecord(saga_id, kind, "subject", step, SagaStatus.UNWINDING, unwind_requested=True)
        bench.log.insert(bench.log, record)
    executor = bench.executor(world.definition())
    executor.register(other)
    await executor.recover()
    await executor.wait("s1")
    assert world.calls == ["undo y", "undo x", "undo c", "undo b", "undo a"]


async def test_what_is_stuck_past_the_pivot_goes_on_when_it_is_started_again(world: World, bench: Bench) -> None:
    definition = world.definition(pivot="b")
    world.do_errors["b"] = [ValueError("in the way")] * 4
    record = await bench.run(definition)
    assert (record.status, record.error["message"]) == (SagaStatus.STUCK_RUNNING, "ValueError: in the way")
    executor = bench.executors[-1]
    executor.start("s1")
    again = await executor.wait("s1")
    assert again is not None
    assert (again.status, again.error) == (SagaStatus.COMPLETED, {})
    assert world.calls[-2:] == ["do b", "do c"]


async def test_the_pivot_is_on_the_log_before_it_runs_even_if_nothing_needs_an_undo(world: World, bench: Bench) -> None:
    on_log: list[str] = []

    async def pivot(context: StepContext) -> dict[str, Any]:
        on_log.append(bench.log.records["s1"].step)
        return {}

    steps = (world.step("a", undoable=False), Step("p", pivot), world.step("c", undoable=False))
    await bench.run(world.definition(steps=steps, pivot="p"))
    assert on_log == ["p"]


async def test_recovery_past_the_pivot_resumes_whatever_the_policy(world: World, bench: Bench) -> None:
    definition = world.definition(pivot="b")
    await interrupted(world, bench, "b", definition)
    again = bench.executor(definition)
    await again.recover()
    record = await again.wait("s1")
    assert record is not None
    assert record.status is SagaStatus.COMPLETED


async def test_recovery_goes_on_with_an_unwinding_and_repeats_its_undos(world: World, bench: Bench) -> None:
    started = asyncio.Event()

    async def hang(context: StepContext) -> None:
        world.calls.append("undo a")
        if not started.is_set():
            started.set()
            await asyncio.Event().wait()
        world.held.discard("a")

    world.do_errors["b"] = [ValueError("broken")]
    definition = world.definition(steps=(Step("a", world.do("a"), hang), world.step("b")))
    executor = Executor(bench.log, [definition], policies=FAST)
    executor.insert(bench.log, "test", "s1", "subject")
    executor.start("s1")
    await started.wait()
    await executor.close()
    again = bench.executor(definition)
    await again.recover()
    record = await again.wait("s1")
    assert record is not None
    assert (record.status, record.failure) == (SagaStatus.UNWOUND, {"message": "ValueError: broken"})
    assert world.calls == ["do a", "do b", "undo b", "undo a", "undo b", "undo a"]


async def test_recovery_honours_a_request_whose_process_died(world: World, bench: Bench) -> None:
    definition = world.definition(recovery=Recovery.RESUME)
    await interrupted(world, bench, "b", definition)
    bench.log.records["s1"] = replace(bench.log.records["s1"], unwind_requested=True, status=SagaStatus.UNWINDING)
    again = bench.executor(definition)
    await again.recover()
    record = await again.wait("s1")
    assert record is not None
    assert (record.status, world.held) == (SagaStatus.UNWOUND, set())


async def test_a_step_of_another_version_is_stuck_not_guessed(world: World, bench: Bench) -> None:
    definition = world.definition()
    bench.log.insert(bench.log, SagaRecord("s1", "test", "subject", step="gone"))
    executor = bench.executor(definition)
    await executor.recover()
    record = await executor.wait("s1")
    assert record is not None
    assert record.is_stuck
    assert "no step 'gone'" in record.error["message"]
    assert world.calls == []


async def test_an_unknown_kind_is_left_alone(world: World, bench: Bench) -> None:
    bench.log.insert(bench.log, SagaRecord("s1", "other", "subject", step="a"))
    executor = bench.executor(world.definition())
    await executor.recover()
    assert not executor.is_under_way("s1")
    assert bench.log.records["s1"].status is SagaStatus.RUNNING


def test_definitions_are_checked() -> None:
    async def do(context: StepContext) -> dict[str, Any]:
        return {}

    with pytest.raises(ValueError, match="distinct"):
        SagaDefinition[MemorySagaLog]("x", (Step("a", do), Step("a", do)))
    with pytest.raises(ValueError, match="pivot"):
        SagaDefinition[MemorySagaLog]("x", (Step("a", do),), pivot="b")
