"""verify: is a checkpoint the base plus these adapters, and how was it rounded; is an output what its report says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import memory, planning
from loratools.engine.changes import collect, source_id
from loratools.engine.context import Outcome
from loratools.engine.events import Listener, ignore
from loratools.engine.execute import observe
from loratools.engine.plan import Plan
from loratools.engine.planning import Run
from loratools.engine.reports import AbstractReport
from loratools.engine.verdicts import GOOD, OPEN, VERDICTS, Verdict
from loratools.engine.verify_units import VerifyPlanner
from loratools.engine.vocabulary import lengthened
from loratools.errors import UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source

HOLDS: Final = "holds"
DOES_NOT: Final = "does not hold"
CANNOT_TELL: Final = "cannot tell"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport(AbstractReport):
    """What is true of a claim.

    Attributes:
        answer: `holds`, `does not hold`, `cannot tell`.
        claim: `merge`: it is the base plus the adapters.
        inputs: role and base name of everything that was looked at.
        parameters: the options.
        policies: how the tensors that adapters change were rounded → how many.
        totals: tensors by verdict, and of those that no adapter changes how many are `same` and how many not.
        modules: every tensor that adapters change: `name`, `verdict`, `policy`, `scale`, `deviating`, `entries`,
            `worst`, `detail`; see `docs/guide/verify.md`.
        tensors: the same of all others that are not as they should be.
        notes: what a user should know.
    """

    answer: str
    claim: str
    inputs: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any]
    policies: Mapping[str, int]
    totals: Mapping[str, Any]
    modules: tuple[Mapping[str, Any], ...]
    tensors: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "verify"


def verify(
    output: Source | Checkpoint,
    inputs: Sequence[Source | Checkpoint | Adapter] = (),
    *,
    base: Source | Checkpoint | None = None,
    adapters: Sequence[Source | Adapter] = (),
    weights: Sequence[float] | float | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    listener: Listener = ignore,
) -> VerifyReport:
    """Answer whether a checkpoint is `base + Σ w ΔW`; nothing is written.

    Args:
        output: the merged checkpoint.
        inputs: none, where a base is given.
        base: what it should have been merged into.
        adapters: what should be in it; none: it should be the base, in whatever dtype and shards.
        weights: none is 1 each, one is for all, or one each. What a report beside `output` says is not believed.
        max_memory: limit of the predicted peak in bytes.
        threads: tensors at a time.
        listener: receives progress.

    Raises:
        MismatchError: an adapter does not belong to this base, or the checkpoint is of another architecture.
        NonFiniteError: the base or an adapter holds NaN or infinity.
        UsageError: adapters without a base; inputs beside one.

    Law: for a merge of `merge`, PEFT (`merge_and_unload`, safe or not, in 16 bits or 32) the answer is `holds`, or
    `cannot tell` where no entry of some tensor moved; it is `does not hold` where an entry that no adapter accounts for
    is another one.
    """
    run = Run(max_memory=max_memory, threads=threads, device="cpu", listener=listener)
    given = planning.as_list(adapters)
    if base is None or inputs:
        raise UsageError(
            "verify holds a checkpoint against its base and adapters.", fix="Give --base and --adapter, and no INPUT."
        )
    return _merge_claim(output, base, given, weights, run)


def _merge_claim(
    output: Source | Checkpoint,
    base: Source | Checkpoint,
    adapters: Sequence[Source | Adapter],
    weights: Sequence[float] | float | None,
    run: Run,
) -> VerifyReport:
    merged, original = open_checkpoint(output), open_checkpoint(base)
    loaded = [lengthened(load_adapter(each, base=original), original) for each in adapters]
    factors = planning.weights_for(len(loaded), weights)
    changes = collect(original, loaded, factors)
    planner = VerifyPlanner.of(merged, original, changes)
    sources: dict[str, Checkpoint | Adapter] = {"merged": merged, "base": original}
    sources |= {source_id(index): adapter for index, adapter in enumerate(loaded)}
    units = planner.units()
    plan = Plan(
        verb="verify",
        kind="report",
        output="",
        overwrite=False,
        sources=planning.infos(sources),
        units=tuple(units),
        bounds=planning.bounds(units, sources.values(), run, write=0),
        options={"weights": factors},
        rules=VERDICTS,
        notes=(*merged.notes, *original.notes, *changes.notes),
    )
    memory.require(plan, run.max_memory)
    return _report(plan, planner, observe(plan, sources, run))


def _report(plan: Plan, planner: VerifyPlanner, outcomes: Sequence[Outcome]) -> VerifyReport:
    touched = [outcome for outcome in outcomes if outcome.operation in {"verify", "verify-added"}]
    same = [outcome for outcome in outcomes if outcome.operation == "verify-same"]
    modules = [{"name": outcome.target, **outcome.facts} for outcome in touched]
    others = [_row(name, verdict) for name, verdict in planner.apart().items()]
    others += [_row(each["name"], Verdict("changed", deviating=each["deviating"]), each["entries"])
               for outcome in same for each in outcome.facts["deviating"]]  # fmt: skip
    untouched = sum(outcome.facts["count"] for outcome in same)
    changed = sum(row["verdict"] == "changed" for row in others)
    return VerifyReport(
        answer=_answer([*modules, *others]),
        claim="merge",
        inputs=tuple({"role": source.role, "name": source.name} for source in plan.sources),
        parameters=plan.options,
        policies=dict(Counter(row["policy"] for row in modules if row["verdict"] == GOOD)),
        totals={
            "tensors": len(modules) + untouched + sum(row["verdict"] in {"absent", "reshaped"} for row in others),
            "verdicts": dict(Counter(row["verdict"] for row in [*modules, *others])),
            "same": untouched - changed,
            "changed": changed,
        },
        modules=tuple(modules),
        tensors=tuple(others),
        notes=(*plan.notes, *_advice(modules, changed, untouched)),
    )


def _row(name: str, verdict: Verdict, entries: int | None = None) -> dict[str, Any]:
    return {"name": name, **dataclasses.asdict(verdict), "entries": entries}


def _answer(rows: Sequence[Mapping[str, Any]]) -> str:
    verdicts = {row["verdict"] for row in rows}
    if verdicts - {GOOD, OPEN}:
        return DOES_NOT
    return CANNOT_TELL if OPEN in verdicts else HOLDS


def _advice(modules: Sequence[Mapping[str, Any]], changed: int, untouched: int) -> list[str]:
    """What the pattern of verdicts suggests."""
    verdicts = Counter(row["verdict"] for row in modules)
    notes = []
    if changed and 2 * changed > untouched:
        notes.append(f"{changed} of {untouched} tensors that no adapter touches differ: is this the base?")
    if 0 < verdicts["missing"] < len(modules):
        notes.append(f"Partly merged: {verdicts['missing']} of {len(modules)} tensors are as in the base.")
    scales = {round(row["scale"][0], 3) for row in modules if row["verdict"] == "scale" and len(row["scale"]) == 1}
    if len(scales) == 1 and verdicts["scale"] == len(modules):
        notes.append(f"Everywhere it is {scales.pop():g} times what was said: is that the weight?")
    return notes
