"""verify: is a checkpoint the base plus these adapters, and how was it rounded; is an output what its report says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import memory, planning
from loratools.engine.changes import collect, source_id
from loratools.engine.context import Outcome
from loratools.engine.events import Advanced, Listener, Stage, ignore
from loratools.engine.execute import observe
from loratools.engine.outputs import OwnReport, file_verdicts, matched
from loratools.engine.plan import Plan
from loratools.engine.planning import Run
from loratools.engine.rederiving import Derivation, Sources
from loratools.engine.rederiving import derivation as rederivation
from loratools.engine.reports import AbstractReport
from loratools.engine.verdicts import GOOD, VERDICTS
from loratools.engine.verify_tally import DOES_NOT, Tally
from loratools.engine.verify_units import VerifyPlanner
from loratools.engine.vocabulary import lengthened
from loratools.errors import InputDataError, UsageError
from loratools.files import load_adapter, open_activations, open_checkpoint
from loratools.files.locate import Source, kind_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport(AbstractReport):
    """What is true of a claim.

    Attributes:
        answer: `holds`, `does not hold`, `cannot tell`.
        claim: `merge`: it is the base plus the adapters; `report`: it is what its own report says.
        inputs: role and base name of everything that it is about.
        parameters: the options; of an output of ours the verb that made it, whether it was `derived` anew, and options.
        policies: how the tensors that adapters change were rounded → how many.
        totals: tensors by verdict, and of those that no adapter changes how many are `same` and how many not.
        files: of an output of ours every file: `name`, and `holds`, `changed`, `absent` or `extra`.
        modules: every tensor that adapters change, of an adapter every module: `name`, `verdict`, `policy`, `scale`,
            `deviating`, `entries`, `worst`, `detail`; see `docs/guide/verify.md`.
        tensors: the same of all others that are not as they should be.
        notes: what a user should know.
    """

    answer: str
    claim: str
    inputs: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any]
    policies: Mapping[str, int]
    totals: Mapping[str, Any]
    files: tuple[Mapping[str, Any], ...]
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
    """Answer whether a checkpoint is `base + Σ w ΔW`, or an output of ours what its report says; nothing is written.

    Args:
        output: the merged checkpoint, or an output of merge, unmerge, extract, stack, resize or rescale, with a report.
        inputs: all that the report names as inputs, in any order: the output is derived from them anew. None: only its
            files are held against their hashes.
        base: what it should have been merged into.
        adapters: what should be in it; none: it should be the base, in whatever dtype and shards.
        weights: none is 1 each, one is for all, or one each. What a report beside `output` says is not believed.
        max_memory: limit of the predicted peak in bytes.
        threads: tensors at a time.
        listener: receives progress.

    Raises:
        MismatchError: an adapter does not belong to this base, the checkpoint is of another architecture, or an input
            is none of those that the report names; says what differs.
        UndecidedError: no base is given and no report is there, or not all inputs of the report are given.
        NonFiniteError: the base or an adapter holds NaN or infinity.
        UsageError: adapters without a base; inputs beside one.
        UnsupportedError: the report is of a verb whose outputs are not verified.

    Law: for a merge of `merge`, PEFT (`merge_and_unload`, safe or not, in 16 bits or 32) the answer is `holds`, or
    `cannot tell` where no entry of some tensor moved; it is `does not hold` where an entry that no adapter accounts for
    is another one.
    """
    run = Run(max_memory=max_memory, threads=threads, device="cpu", listener=listener)
    given = planning.as_list(adapters)
    if base is not None:
        if inputs:
            raise UsageError("INPUTs are those that a report names.", fix="With --base, name adapters by --adapter.")
        return _merge_claim(output, base, given, weights, run)
    if given or weights is not None:
        raise UsageError("Adapters and weights are held against a base.", fix="Give --base, or INPUTs alone.")
    if isinstance(output, Checkpoint):
        raise UsageError("Only an output on disk has a report.", fix="Give its path, or a base.")
    return _report_claim(output, list(inputs), run)


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
    sources: Sources = {"merged": merged, "base": original}
    sources |= {source_id(index): adapter for index, adapter in enumerate(loaded)}
    notes = (*merged.notes, *original.notes, *changes.notes)
    derivation = Derivation(sources, tuple(planner.units()), planner.apart(), notes)
    tally = Tally.of(_observed(derivation, run), derivation.apart)
    return _report(
        tally,
        claim="merge",
        inputs=tuple({"role": key.rstrip("0123456789"), "name": each.name} for key, each in sources.items()),
        parameters={"weights": factors},
        notes=(*notes, *tally.advice()),
    )


def _report_claim(output: Source, inputs: list[Source | Checkpoint | Adapter], run: Run) -> VerifyReport:
    own = OwnReport.of(output)

    def hashed(nbytes: int, name: str) -> None:
        run.listener(Advanced(nbytes, name))

    run.listener(Stage("hashing"))
    files = tuple({"name": name, "verdict": told} for name, told in file_verdicts(output, own, hashed).items())
    spoilt = any(each["verdict"] != GOOD for each in files)
    notes, tally = [], Tally((), (), 0)
    if spoilt:
        notes.append("Its files are not those that it was written with, so they were not held against its inputs.")
    elif inputs:
        sources = matched(own, [_opened(each) for each in inputs], hashed)
        derivation = rederivation(output, own, sources)
        tally = Tally.of(_observed(derivation, run), derivation.apart, own, derivation.strange)
        notes += derivation.notes
    else:
        notes.append("Its files are those of its report. Whether it follows from its inputs was not asked: name them.")
    about = [("output", Path(output).name), *((each.role, each.name) for each in own.inputs)]
    report = _report(
        tally,
        claim="report",
        inputs=tuple({"role": role, "name": name} for role, name in about),
        parameters={"verb": own.verb, "derived": bool(inputs) and not spoilt, **own.parameters},
        notes=(*notes, *tally.advice()),
    )
    return dataclasses.replace(report, files=files, answer=DOES_NOT if spoilt else report.answer)


def _opened(source: Source | Checkpoint | Adapter) -> Checkpoint | Adapter:
    if isinstance(source, (Checkpoint, Adapter)):
        return source
    if Path(source).is_file() and kind_of(source) == "checkpoint":
        try:
            return open_checkpoint(source)
        except InputDataError:
            return open_activations(source).source
    return load_adapter(source) if kind_of(source) == "adapter" else open_checkpoint(source)


def _observed(derivation: Derivation, run: Run) -> list[Outcome]:
    """Run the units within the limits."""
    plan = Plan(
        verb="verify",
        kind="report",
        output="",
        overwrite=False,
        sources=planning.infos(derivation.sources),
        units=derivation.units,
        bounds=planning.bounds(derivation.units, derivation.sources.values(), run, write=0),
        rules=VERDICTS,
    )
    memory.require(plan, run.max_memory)
    return observe(plan, derivation.sources, run)


def _report(tally: Tally, **said: Any) -> VerifyReport:
    return VerifyReport(
        answer=tally.answer,
        policies=tally.policies,
        totals=tally.totals,
        files=(),
        modules=tally.modules,
        tensors=(*tally.tensors, *tally.receipt),
        **said,
    )
