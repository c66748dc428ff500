"""Runs sagas: one task each, every move on the log before the next.

Called by ``lifecycle``. A step's intent is durable before its ``do`` and its output after; a failure unwinds, the
failing step included; past the pivot there is only forward, then ``stuck``. A requested unwinding wins over everything.
The executor never decides what a failure means for the subject: the definition's hooks do, in the log's transaction.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, Generic

from atelier.saga.definition import (
    JsonObject,
    Recovery,
    SagaDefinition,
    SagaInterruptedError,
    Step,
    StepContext,
)
from atelier.saga.log import Hook, SagaGoneError, SagaLog, SagaRecord, SagaStatus, TransactionT
from atelier.saga.retry import RetryPolicies
from atelier.telemetry.logs import log_context

_logger = logging.getLogger(__name__)

_RECOVERIES_MAX = 3
"""A saga that so many starts have resumed is unwound by the next one: it may be what ends the process."""
_LOG_ATTEMPTS = 12
"""After so many refusals of the log (a full disk, as a rule) an unwinding tries to say that it is stuck."""


class _UnwindRequested(Exception):
    """Somebody asked for the unwinding while a step was under way."""


class _Run:
    """What the process knows of a saga under way, beyond the log."""

    def __init__(self, saga_id: str, *, recovering: bool) -> None:
        self.saga_id = saga_id
        self.recovering = recovering
        self.woken = False
        self.unwind_requested = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.doing: asyncio.Task[JsonObject] | None = None

    def request_unwind(self) -> None:
        self.woken = True
        self.unwind_requested.set()
        if self.doing is not None:
            self.doing.cancel()

    def going_on(self, record: SagaRecord) -> SagaRecord:
        """The record of a saga that goes forward (again): no longer stuck, its recoveries counted."""
        if record.unwind_requested:
            return record
        recoveries = record.recoveries + 1 if self.recovering else record.recoveries
        return replace(record, status=SagaStatus.RUNNING, error={}, recoveries=recoveries)

    async def pause(self, seconds: float) -> None:
        """Sleep, but not past a requested unwinding."""
        try:
            async with asyncio.timeout(seconds):
                await self.unwind_requested.wait()
        except TimeoutError:
            return


def _never(error: Exception) -> bool:
    return False


def _plain(error: Exception) -> JsonObject:
    return {"message": f"{type(error).__name__}: {error}"}


class Executor(Generic[TransactionT]):
    """``is_transient`` says which errors of a ``do`` are worth another try before the saga gives up; ``describe`` turns
    an error into what the log keeps of it. An undo that takes longer than ``undo_timeout_seconds`` has failed;
    ``log_pause_seconds`` lie between two tries to write the end of an unwinding to a log that refuses."""

    def __init__(
        self,
        log: SagaLog[TransactionT],
        definitions: Iterable[SagaDefinition[TransactionT]] = (),
        *,
        is_transient: Callable[[Exception], bool] = _never,
        describe: Callable[[Exception], JsonObject] = _plain,
        policies: RetryPolicies | None = None,
        undo_timeout_seconds: float = 120.0,
        log_pause_seconds: float = 5.0,
    ) -> None:
        self._log = log
        self._definitions: dict[str, SagaDefinition[TransactionT]] = {}
        self._is_transient = is_transient
        self._describe = describe
        self._policies = policies or RetryPolicies()
        self._undo_timeout_seconds = undo_timeout_seconds
        self._log_pause = log_pause_seconds
        self._runs: dict[str, _Run] = {}
        self._closed = False
        for definition in definitions:
            self.register(definition)

    def register(self, definition: SagaDefinition[TransactionT]) -> None:
        """Make a kind known. Raises ValueError for a kind that already is."""
        if definition.kind in self._definitions:
            raise ValueError(f"the saga kind {definition.kind} is registered already")
        self._definitions[definition.kind] = definition

    def insert(
        self, transaction: TransactionT, kind: str, saga_id: str, subject_id: str, inputs: JsonObject | None = None
    ) -> SagaRecord:
        """Write a new saga, the intent of its first step included, into the caller's transaction. Once that is
        committed, ``start`` it (a start of the process finds it otherwise)."""
        first = self._definitions[kind].steps[0]
        record = SagaRecord(id=saga_id, kind=kind, subject_id=subject_id, step=first.name, inputs=inputs or {})
        self._log.insert(transaction, record)
        return record

    def start(self, saga_id: str) -> None:
        """Run a saga that stands in the log, in the background. Nothing happens if it runs already."""
        self._launch(saga_id, recovering=False)

    async def request_unwind(self, saga_id: str, also: Hook[TransactionT] | None = None) -> None:
        """Have the saga unwind, wherever it is: running, completed, failed or stuck; and with it all open sagas of its
        subject, the youngest first. Returns once the wish is durable (``also`` joins that transaction); a ``do`` under
        way is cancelled. Twice is once.

        Raises SagaGoneError, and whatever ``also`` raises; then nothing has changed.
        """
        marked: list[SagaRecord] = []

        def mark(record: SagaRecord) -> SagaRecord:
            return replace(record, unwind_requested=True, status=SagaStatus.UNWINDING, error={})

        def mark_all(transaction: TransactionT, record: SagaRecord) -> None:
            marked[:] = self._log.update_open(transaction, record.subject_id, mark)
            if also is not None:
                also(transaction, record)

        await self._log.update(saga_id, mark, mark_all)
        for record in marked:
            run = self._runs.get(record.id)
            if run is None:
                self._launch(record.id, recovering=False)
            else:
                run.request_unwind()

    async def wait(self, saga_id: str) -> SagaRecord | None:
        """Wait until the saga has ended or is stuck; its record as it stands then, None if a hook removed it."""
        while (run := self._runs.get(saga_id)) is not None and run.task is not None:
            await asyncio.wait({run.task})
        return self._log.find(saga_id)

    def is_under_way(self, saga_id: str) -> bool:
        return saga_id in self._runs

    async def recover(self) -> list[SagaRecord]:
        """Take up every open saga that the last process left: unwind or resume it, as asked for or by its kind's
        policy; stuck ones get another chance. Returns the records found; they run in the background."""
        found = self._log.list_open()
        for record in found:
            if record.kind in self._definitions:
                self._launch(record.id, recovering=True)
            else:
                _logger.error("saga %s is of the unknown kind %s and is left alone", record.id, record.kind)
        return found

    async def close(self) -> None:
        """Stop all tasks where they are. Open sagas stay open in the log, for the next ``recover``."""
        self._closed = True
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _launch(self, saga_id: str, *, recovering: bool) -> None:
        if self._closed or saga_id in self._runs:
            return
        run = _Run(saga_id, recovering=recovering)
        self._runs[saga_id] = run
        run.task = asyncio.create_task(self._run(run), name=f"saga {saga_id}")

    async def _run(self, run: _Run) -> None:
        with log_context(saga_id=run.saga_id):
            try:
                while True:
                    run.woken = False
                    try:
                        await self._drive(run)
                    except SagaGoneError:
                        _logger.info("the saga's record is gone")
                    except Exception as error:
                        _logger.exception("the saga cannot go on")
                        await self._try_mark_stuck(run.saga_id, error)
                    if not run.woken:
                        return
            finally:
                del self._runs[run.saga_id]

    async def _drive(self, run: _Run) -> None:
        record = self._log.find(run.saga_id)
        if record is None or not record.is_open:
            return
        definition = self._definitions[record.kind]
        if record.status in (SagaStatus.RUNNING, SagaStatus.STUCK_RUNNING):
            position = definition.index(record.step)
            given_up = False
            if run.recovering and not definition.is_past_pivot(record.step):
                position = 0
                given_up = definition.recovery is Recovery.UNWIND or record.recoveries >= _RECOVERIES_MAX
            if given_up:
                record = await self._fail(definition, record, SagaInterruptedError("the process ended in the middle"))
            else:
                if run.going_on(record) != record:
                    record = await self._log.update(record.id, run.going_on)
                if record.status is SagaStatus.RUNNING:
                    record = await self._forward(run, definition, record, position)
        run.recovering = False
        if record.status in (SagaStatus.UNWINDING, SagaStatus.STUCK_UNWINDING):
            # Who asked for it until now is served by this: only who asks from now on is owed another attempt.
            run.woken = False
            await self._unwind(run, definition, record)

    async def _forward(
        self, run: _Run, definition: SagaDefinition[TransactionT], record: SagaRecord, begin: int
    ) -> SagaRecord:
        """Run the steps from ``begin`` on until the last has ended (completed), one failed or an unwinding was asked
        for (unwinding), or there is no way on past the pivot (stuck)."""
        steps = definition.steps
        for position in range(begin, len(steps)):
            step = steps[position]
            following = steps[position + 1] if position + 1 < len(steps) else None
            try:
                output = await self._do(run, definition, record, step)
                record = await self._advance(definition, record, step, following, output)
            except _UnwindRequested:
                # The request is on disk: the record as it stands there says so.
                return replace(record, status=SagaStatus.UNWINDING, unwind_requested=True)
            except SagaGoneError:
                raise
            except Exception as error:
                if definition.is_past_pivot(step.name):
                    _logger.error("step %s failed past the pivot: %s", step.name, error)
                    return await self._mark_stuck(definition, record, SagaStatus.STUCK_RUNNING, error)
                return await self._fail(definition, record, error)
            if record.status is not SagaStatus.RUNNING:
                return record
        return record

    async def _do(
        self, run: _Run, definition: SagaDefinition[TransactionT], record: SagaRecord, step: Step[TransactionT]
    ) -> JsonObject:
        past_pivot = definition.is_past_pivot(step.name)
        policy = self._policies.forward if past_pivot else self._policies.transient
        delays = policy.delays_seconds()
        while True:
            if run.unwind_requested.is_set():
                raise _UnwindRequested
            try:
                return await self._do_once(run, step, _context(record))
            except Exception as error:
                if run.unwind_requested.is_set():
                    _logger.info("step %s ended with %r when the unwinding was asked for", step.name, error)
                    raise _UnwindRequested from error
                delay = next(delays, None)
                if delay is None or not (past_pivot or self._is_transient(error)):
                    raise
                _logger.warning("step %s failed and is tried again in %g s: %s", step.name, delay, error)
            await run.pause(delay)

    async def _do_once(self, run: _Run, step: Step[TransactionT], context: StepContext) -> JsonObject:
        """One attempt, in a task of its own, so that a requested unwinding can cancel it and not this one."""

        async def attempt() -> JsonObject:
            return await step.do(context)

        run.doing = task = asyncio.create_task(attempt(), name=f"saga {run.saga_id} {step.name}")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            run.doing = None
        if task.cancelled():
            if run.unwind_requested.is_set():
                raise _UnwindRequested
            raise RuntimeError(f"step {step.name} was cancelled from inside")
        return task.result()

    async def _advance(
        self,
        definition: SagaDefinition[TransactionT],
        record: SagaRecord,
        step: Step[TransactionT],
        following: Step[TransactionT] | None,
        output: JsonObject,
    ) -> SagaRecord:
        """Put the output of ``step`` and the intent of ``following`` on disk, in one transaction."""
        outputs = {**record.outputs, step.name: output}
        is_plain = step.undo is None and step.commit is None and not definition.is_past_pivot(step.name)
        if following is not None and is_plain and following.undo is None and following.name != definition.pivot:
            # Neither the output nor the intent is needed to unwind, and both steps may run twice: no write.
            return replace(record, outputs=outputs, step=definition.further(record.step, following.name))

        def change(stored: SagaRecord) -> SagaRecord:
            begun = definition.further(stored.step, step.name)
            if stored.unwind_requested:
                # The output serves the undo; the next step has not begun and never will.
                return replace(stored, outputs=outputs, step=begun)
            if following is None:
                return replace(stored, outputs=outputs, step=begun, status=SagaStatus.COMPLETED)
            return replace(stored, outputs=outputs, step=definition.further(begun, following.name))

        def also(transaction: TransactionT, stored: SagaRecord) -> None:
            if step.commit is not None:
                step.commit(transaction, stored, output)
            if stored.status is SagaStatus.COMPLETED and definition.on_completed is not None:
                definition.on_completed(transaction, stored)

        return await self._log.update(record.id, change, also)

    async def _fail(self, definition: SagaDefinition[TransactionT], record: SagaRecord, error: Exception) -> SagaRecord:
        """Turn around: describe the error while everything still stands, and put that on disk."""
        _logger.warning("step %s failed, the saga unwinds: %s", record.step, error)
        try:
            if definition.on_failure is None:
                failure = self._describe(error)
            else:
                failure = await definition.on_failure(_context(record), error)
        except Exception:
            _logger.exception("the failure could not be described in full")
            failure = self._describe(error)

        def change(stored: SagaRecord) -> SagaRecord:
            if stored.unwind_requested:
                return stored
            # The step too: the log may lag behind by steps that need no undo.
            step = definition.further(stored.step, record.step)
            return replace(stored, status=SagaStatus.UNWINDING, failure=failure, step=step)

        try:
            return await self._log.update(record.id, change)
        except SagaGoneError:
            raise
        except Exception:
            # A log that cannot be written is a poor reason to keep what was acquired. All intents are on disk, so a
            # start after a crash would unwind as well; the end of the unwinding will be written when it can be.
            _logger.exception("the turn to unwinding could not be written")
            return replace(record, status=SagaStatus.UNWINDING, failure=failure)

    async def _unwind(self, run: _Run, definition: SagaDefinition[TransactionT], record: SagaRecord) -> None:
        """Undo from the furthest step back to the first; then ``unwound``, or ``stuck`` at an undo that keeps failing.

        Undos leave no trace in the log until all are done: each may run twice. One that was asked for undoes the whole
        list: later sagas may have acquired for the subject what this record knows nothing of. When the unwinding of a
        failure turns out to have been asked for meanwhile, all run once more, for good.
        """
        await self._await_younger(record)
        ended = False
        while not ended:
            requested = record.unwind_requested or run.unwind_requested.is_set()
            begun = definition.steps if requested else definition.steps[: definition.index(record.step) + 1]
            for step in reversed(begun):
                if step.undo is None:
                    continue
                error = await self._undo(step.name, step.undo, _context(record, unwind_requested=requested))
                if error is not None:
                    _logger.error("the undo of step %s keeps failing, the saga is stuck: %s", step.name, error)
                    await self._mark_stuck(definition, record, SagaStatus.STUCK_UNWINDING, error)
                    return
            ended = await self._end_unwinding(definition, record, requested=requested)
            record = replace(record, unwind_requested=True)

    async def _await_younger(self, record: SagaRecord) -> None:
        """Sagas of one subject build on one another: the youngest lets go first."""
        while True:
            runs = [self._runs.get(younger.id) for younger in self._log.list_younger(record)]
            if not (tasks := [run.task for run in runs if run is not None and run.task is not None]):
                return
            await asyncio.wait(tasks)

    async def _undo(
        self, name: str, undo: Callable[[StepContext], Awaitable[None]], context: StepContext
    ) -> Exception | None:
        """Run an undo until it succeeds, or return its last error when the attempts are used up."""
        for delay in (*self._policies.undo.delays_seconds(), None):
            limit = asyncio.timeout(self._undo_timeout_seconds)
            try:
                async with limit:
                    await undo(context)
                return None
            except Exception as caught:
                error = caught
                if isinstance(caught, TimeoutError) and limit.expired():
                    error = TimeoutError(f"no end within {self._undo_timeout_seconds:g} s")
            if delay is None:
                return error
            _logger.warning("the undo of step %s failed and is tried again in %g s: %s", name, delay, error)
            await asyncio.sleep(delay)
        return None

    async def _mark_stuck(
        self, definition: SagaDefinition[TransactionT], record: SagaRecord, status: SagaStatus, error: Exception
    ) -> SagaRecord:
        described = self._describe(error)

        def change(stored: SagaRecord) -> SagaRecord:
            if stored.unwind_requested and status is SagaStatus.STUCK_RUNNING:
                return stored
            return replace(stored, status=status, error=described)

        def also(transaction: TransactionT, stored: SagaRecord) -> None:
            if stored.is_stuck and definition.on_stuck is not None:
                definition.on_stuck(transaction, stored)

        return await self._log.update(record.id, change, also)

    async def _try_mark_stuck(self, saga_id: str, error: Exception) -> bool:
        """Last resort for an error of the engine, a hook or the log itself: say so where it is seen."""
        try:
            record = self._log.find(saga_id)
            if record is None or not record.is_open:
                return True
            unwinding = record.status in (SagaStatus.UNWINDING, SagaStatus.STUCK_UNWINDING)
            status = SagaStatus.STUCK_UNWINDING if unwinding else SagaStatus.STUCK_RUNNING
            await self._mark_stuck(self._definitions[record.kind], record, status, error)
        except Exception:
            _logger.exception("that the saga is stuck could not be written")
            return False
        return True

    async def _end_unwinding(
        self, definition: SagaDefinition[TransactionT], record: SagaRecord, *, requested: bool
    ) -> bool:
        """Write the end of an unwinding, however long the log refuses: what was acquired is free already. False when
        the unwinding was asked for and the undos did not know."""

        def change(stored: SagaRecord) -> SagaRecord:
            if stored.unwind_requested and not requested:
                return stored
            # The failure again, for the case that the turn to unwinding could not be written.
            failure = stored.failure or ({} if stored.unwind_requested else record.failure)
            return replace(stored, status=SagaStatus.UNWOUND, failure=failure, error={})

        def also(transaction: TransactionT, stored: SagaRecord) -> None:
            if stored.status is SagaStatus.UNWOUND and definition.on_unwound is not None:
                definition.on_unwound(transaction, stored)

        for attempt in itertools.count(1):
            try:
                return (await self._log.update(record.id, change, also)).status is SagaStatus.UNWOUND
            except SagaGoneError:
                raise
            except Exception as error:
                _logger.exception("the end of the unwinding could not be written, tried again in %g s", self._log_pause)
                if attempt % _LOG_ATTEMPTS == 0 and await self._try_mark_stuck(record.id, error):
                    return True
            await asyncio.sleep(self._log_pause)
        return True


def _context(record: SagaRecord, *, unwind_requested: bool | None = None) -> StepContext:
    outputs: dict[str, dict[str, Any]] = record.outputs
    return StepContext(
        saga_id=record.id,
        subject_id=record.subject_id,
        inputs=record.inputs,
        outputs=outputs,
        unwind_requested=record.unwind_requested if unwind_requested is None else unwind_requested,
    )
