"""Units over threads: each once, the first failure of the plan's order is the one that is told."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from loratools.engine import memory
from loratools.engine.context import Context, Outcome, Stopped
from loratools.engine.events import Advanced, Stage
from loratools.engine.operations import OPERATIONS
from loratools.engine.plan import Plan, Unit
from loratools.engine.planning import Run

Perform = Callable[[int, Unit, Context], Outcome]


def progress(run: Run) -> Callable[[int, str], None]:
    """What tells the listener how far the units are; from any thread."""
    lock = threading.Lock()

    def advance(nbytes: int, target: str) -> None:
        with lock:
            run.listener(Advanced(nbytes, target))

    return advance


def perform(index: int, unit: Unit, context: Context) -> Outcome:
    """Run one unit, whose number in the plan is `index`."""
    del index
    outcome = OPERATIONS[unit.operation](unit, context)
    context.sink.unit_done(unit.file)
    return outcome


def run_units(
    plan: Plan,
    units: Sequence[Unit],
    early: Context,
    run: Run,
    *,
    computes: bool,
    perform: Perform = perform,
) -> list[Outcome]:
    """Run units of a plan. Those that hash come first: they start while torch, a second's work, is imported."""
    tensors = sum(len(source) for source in early.sources.values())
    gate = memory.Gate(memory.room(plan.units, tensors, run.max_memory))
    failed: list[int] = []
    with ThreadPoolExecutor(early.settings.threads, "loratools") as pool:
        futures: list[Future[Outcome]] = []
        try:
            for index, unit in enumerate(units):
                if unit.operation != "hash":
                    break
                futures.append(pool.submit(_Worker(early, gate, failed, perform), index, unit))
            late = dataclasses.replace(early, settings=run.settings(computes=computes))
            worker = _Worker(late, gate, failed, perform)
            with _one_thread_each(plan):
                start = len(futures)
                futures += (pool.submit(worker, start + index, unit) for index, unit in enumerate(units[start:]))
                return _results_of(futures, failed)
        except BaseException:
            early.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def run_closing(plan: Plan, found: list[Outcome], early: Context, run: Run, *, computes: bool) -> list[Outcome]:
    """Run a plan's closing units; what they ask for again is run again, as often as they ask."""
    done = list(zip(plan.units, found, strict=True))
    last = []
    for unit in plan.closing:
        while (outcome := OPERATIONS[unit.operation](unit, dataclasses.replace(early, done=tuple(done)))).again:
            run.listener(Stage(f"{outcome.what}: {len(outcome.again)}"))
            unseen = dataclasses.replace(early, advance=lambda *_: None)
            results = run_units(plan, outcome.again, unseen, run, computes=computes)
            fresh = {_name(each): (each, result) for each, result in zip(outcome.again, results, strict=True)}
            done = [fresh.get(_name(each[0]), each) for each in done]
        last.append(outcome)
    return [*(outcome for _, outcome in done), *last]


def _name(unit: Unit) -> tuple[str, str]:
    return unit.operation, unit.target


def _results_of(futures: Sequence[Future[Outcome]], failed: Sequence[int]) -> list[Outcome]:
    wait(futures, return_when=FIRST_EXCEPTION)
    if failed:  # those before it have been started; the first error of all is the one to tell
        wait(futures[: min(failed)])
    return _results(futures)


@dataclasses.dataclass(frozen=True, slots=True)
class _Worker:
    """Runs units, from several threads; once one has failed, only those that come before it in the plan."""

    context: Context
    gate: memory.Gate
    failed: list[int]
    perform: Perform

    def __call__(self, index: int, unit: Unit) -> Outcome:
        with self.gate.held(unit.peak_bytes + memory.BUFFERS):
            self.context.check()
            if self.failed and index > min(self.failed):
                raise Stopped
            try:
                return self.perform(index, unit, self.context)
            except Exception:
                self.failed.append(index)
                raise


def _results(futures: Sequence[Future[Outcome]]) -> list[Outcome]:
    """All results, or the first real failure in the plan's order."""
    for future in futures:
        if future.done() and not future.cancelled():
            error = future.exception()
            if error is not None and not isinstance(error, Stopped):
                raise error
    return [future.result() for future in futures]


@contextmanager
def _one_thread_each(plan: Plan) -> Iterator[None]:
    """One BLAS thread per unit: the parallelism is between units, and results do not depend on it."""
    if all(unit.operation in {"hash", "copy"} for unit in plan.units):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
