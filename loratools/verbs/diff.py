"""diff: two checkpoints: which tensors differ, by how much, and what an adapter of that would cost at every rank."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.adapters import Adapter, Selection
from loratools.checkpoints import Checkpoint, owner
from loratools.engine import planning
from loratools.engine.compare_units import Comparison, comparison
from loratools.engine.context import Outcome
from loratools.engine.events import Listener, ignore
from loratools.engine.execute import observe
from loratools.engine.plan import Plan
from loratools.engine.planning import Run
from loratools.engine.reports import AbstractReport
from loratools.engine.spectrum import ModuleSpectrum, Spectrum, ranks, table
from loratools.engine.svd_options import SvdOptions
from loratools.errors import UnsupportedError, UsageError
from loratools.files import open_checkpoint
from loratools.files.locate import Source, kind_of
from loratools.tensors import TensorRef

KINDS: Final = {
    "identical": "the same dtype, shape and bytes",
    "equal": "the same numbers in other bytes: a wider dtype, or zeros of another sign",
    "recast": "one is the other rounded to its dtype",
    "changed": "other numbers",
    "reshaped": "another shape: a head of another size, or rows that the first vocabulary does not have",
    "added": "only the second checkpoint has it",
    "removed": "only the first checkpoint has it",
}
"""What may have become of a tensor."""
SAME: Final = frozenset({"identical", "equal"})
_ROLES: Final = ("a", "b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffReport(AbstractReport):
    """What the difference of two checkpoints is.

    Attributes:
        same: every tensor is identical or equal in value.
        inputs: role (`a`, `b`), kind, base name, tensors and bytes of both.
        parameters: the options.
        totals: tensors and bytes per kind of difference, all kinds named; ‖ΔW‖ over all tensors of one shape, and
            relative to ‖W‖ of those that changed.
        table: with a spectrum, for ranks 1, 2, 4, …: `rank`, `bytes` of an adapter's tensors, `captured` and `residual`
            over all low-rank modules, `worst`, the module with the largest residual, and its `residual`.
        whole: with a spectrum, bytes of what an adapter stores as it is, part of every row; else None.
        modules: every module with a tensor that is not the same, with `kinds`, `norm` ‖ΔW‖_F and `relative` to
            ‖W‖_F of its tensors that changed; `spectrum`, or None: see `docs/guide/diff.md`.
        tensors: every tensor: `name`, `module`, `kind`, `dtype` and `shape` on either side, `norm`, `relative`.
        notes: what a user should know.
    """

    same: bool
    inputs: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any]
    totals: Mapping[str, Any]
    table: tuple[Mapping[str, Any], ...]
    whole: int | None
    notes: tuple[str, ...]
    modules: tuple[Mapping[str, Any], ...]
    tensors: tuple[Mapping[str, Any], ...]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "diff"


def diff(
    a: Source | Checkpoint,
    b: Source | Checkpoint,
    *others: Source | Checkpoint,
    spectrum: bool = False,
    max_rank: int = 128,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "auto",
    listener: Listener = ignore,
) -> DiffReport:
    """Compare two checkpoints tensor by tensor; nothing is written.

    Args:
        a: the first checkpoint, such as the base.
        b: the second, such as the fine-tuned one; a prefix that differs from the first one's is reconciled and said.
        others: none; more than two are not compared.
        spectrum: decompose ΔW = b − a of every matrix that `extract` makes low-rank, once, at `max_rank`, and read
            every smaller rank off that.
        max_rank: singular values per matrix that the spectrum looks at.
        include: patterns of modules to look at; default all.
        exclude: patterns of modules not to look at.
        device: where spectra are computed.
        listener: receives progress.

    Raises:
        UnsupportedError: an adapter, or more than two inputs.
        MismatchError: the two are not checkpoints of one architecture.
        NonFiniteError: NaN or infinity in a tensor that differs, with its name and their number.
        UsageError: a pattern matches no module, a rank below 1, a device that is not there.

    Law: every tensor of both sides has one kind. A row of the table is what `extract` with that `rank` writes: its
    bytes without the file's header, its residual to within what a certificate promises.
    """
    _require_two_checkpoints((a, b, *others))
    if max_rank < 1:
        raise UsageError("A rank is at least 1.", max_rank=max_rank)
    sides = dict(zip(_ROLES, (open_checkpoint(a), open_checkpoint(b)), strict=True))
    run = Run(device=device, listener=listener)
    svd = SvdOptions(rank=max_rank, energy=None, error=None, max_rank=max_rank, preset="default", seed=0)
    found = comparison(sides["a"], sides["b"], Selection(tuple(include), tuple(exclude)), svd if spectrum else None)
    options = {"spectrum": spectrum, "max_rank": max_rank, "include": list(include), "exclude": list(exclude)}
    sources: dict[str, Checkpoint | Adapter] = {"base": sides["a"], "tuned": sides["b"]}
    plan = Plan(
        verb="diff",
        kind="report",
        output="",
        overwrite=False,
        sources=planning.infos(sources),
        units=found.units,
        bounds=planning.bounds(found.units, sources.values(), run, write=0),
        options=options,
        rules=KINDS,
        notes=(*sides["a"].notes, *sides["b"].notes, *found.pairing.notes),
    )
    return _report(plan, sides, found, observe(plan, sources, run))


def _require_two_checkpoints(sources: Sequence[Source | Checkpoint | Adapter]) -> None:
    for source in sources:
        if isinstance(source, Adapter) or (not isinstance(source, Checkpoint) and kind_of(source) == "adapter"):
            raise UnsupportedError(
                "diff compares checkpoints, and this is an adapter.",
                fix="Merge it into its base, and compare that; `loratools inspect` says what the adapter is.",
                source=source.name if isinstance(source, Adapter) else source,
            )
    if len(sources) != len(_ROLES):
        raise UnsupportedError(
            "diff compares two checkpoints at a time.", fix="Compare each with the first.", inputs=len(sources)
        )


def _report(plan: Plan, sides: Mapping[str, Checkpoint], found: Comparison, outcomes: Sequence[Outcome]) -> DiffReport:
    compared = {
        names: {**facts, "module": outcome.target}
        for outcome in outcomes
        for names, facts in outcome.facts["tensors"].items()
    }
    tensors = _tensors(found, compared)
    spectra = [
        ModuleSpectrum(outcome.target, spectrum["sides"], tuple(Spectrum.of(each) for each in spectrum["parts"]))
        for outcome in outcomes
        if (spectrum := outcome.facts["spectrum"]) is not None
    ]
    asked = plan.options["spectrum"]
    whole = sum(outcome.facts["whole"] for outcome in outcomes) if asked else None
    return DiffReport(
        same=all(row["kind"] in SAME for row in tensors),
        inputs=tuple(
            {
                "role": role,
                "kind": "checkpoint",
                "name": side.name,
                "tensors": len(side),
                "bytes": sum(ref.nbytes for ref in side.values()),
            }
            for role, side in sides.items()
        ),
        parameters=plan.options,
        totals=_totals(tensors),
        table=tuple(table(spectra, whole or 0, plan.options["max_rank"])),
        whole=whole,
        notes=(*plan.notes, *(_left_out(found, tensors) if asked else ())),
        modules=tuple(_modules(tensors, {each.name: each for each in spectra}, plan.options["max_rank"])),
        tensors=tuple(tensors),
    )


def _tensors(found: Comparison, compared: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every tensor: those of the second checkpoint in its order, then what only the first has."""
    rows = []
    for path, pair in found.pairs:
        facts = compared.get((pair.base.name, pair.tuned.name), {}) if pair.base is not None else {}
        kind = facts.get("kind", "reshaped" if pair.relation == "reshaped" else "added")
        row = _row(pair.tuned_name, "reshaped" if pair.relation == "rows" else kind, pair.base, pair.tuned)
        weight = facts.get("weight_norm")
        norm = facts.get("norm", 0.0 if facts.get("kind") in SAME else None)
        relative = norm / weight if norm is not None and weight else norm if norm == 0 else None
        rows.append({**row, "module": facts.get("module", path), "norm": norm, "relative": relative})
    for ref in found.removed:
        row = _row(ref.name, "removed", ref, None)
        rows.append({**row, "module": owner(ref.name)[0], "norm": None, "relative": None})
    return rows


def _row(name: str, kind: str, base: TensorRef | None, tuned: TensorRef | None) -> dict[str, Any]:
    sides = (base, tuned)
    return {
        "name": name,
        "module": "",
        "kind": kind,
        "dtype": [ref.dtype if ref is not None else None for ref in sides],
        "shape": [list(ref.shape) if ref is not None else None for ref in sides],
        "bytes": [ref.nbytes if ref is not None else 0 for ref in sides],
    }


def _size(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """‖ΔW‖ over what was measured, and relative to ‖W‖ of what of that differs."""
    measured = [row for row in rows if row["norm"]]
    norm = math.hypot(*(row["norm"] for row in measured))
    weights = [row["norm"] / row["relative"] for row in measured if row["relative"]]
    return {"norm": norm, "relative": norm / math.hypot(*weights) if weights else None}


def _totals(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    numbers = Counter(row["kind"] for row in tensors)
    nbytes: Counter[str] = Counter()
    for row in tensors:
        nbytes[row["kind"]] += max(row["bytes"])
    return {
        "tensors": {kind: numbers[kind] for kind in KINDS},
        "bytes": {kind: nbytes[kind] for kind in KINDS},
        **_size(tensors),
    }


def _modules(
    tensors: Sequence[Mapping[str, Any]], spectra: Mapping[str, ModuleSpectrum], cap: int
) -> Iterator[dict[str, Any]]:
    """Every module of which something is not the same."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in tensors:
        if row["kind"] not in SAME:
            groups.setdefault(row["module"], []).append(row)
    for name, rows in groups.items():
        found = spectra.get(name)
        spectrum = _spectrum(found, cap) if found is not None else None
        yield {"name": name, "kinds": dict(Counter(row["kind"] for row in rows)), **_size(rows), "spectrum": spectrum}


def _spectrum(module: ModuleSpectrum, cap: int) -> dict[str, Any]:
    """A module's own column of the table, its effective rank, and the values; of experts a list of each."""
    known = list(ranks(module.most, cap))
    values = [[float(f"{value:.7g}") for value in part.values] for part in module.parts]
    return {
        "norm": math.sqrt(module.squares),
        "matrices": len(module.parts),
        "known": module.most,
        "effective_rank": list(module.effective_rank()),
        "residuals": {str(rank): module.residual(rank) for rank in known},
        "singular_values": values[0] if len(values) == 1 else values,
    }


def _left_out(found: Comparison, tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What keeps `extract` from writing what the table says, or makes it write more than one would think."""
    refused = {
        address.name
        for unit in found.units
        for rule in unit.parameters.get("rules", {}).values()
        if rule["rule"].startswith("refused:")
        for address in (unit.inputs[rule["tuned"]],)
    }
    new = [pair.tuned_name for _, pair in found.pairs if pair.relation == "new-parameter"]
    odd = [*new, *(row["name"] for row in tensors if row["name"] in refused and row["kind"] not in SAME)]
    if odd:
        yield f"The table leaves out what extract refuses: {_some(odd)}."
    recast = [row["name"] for row in tensors if row["kind"] == "recast"]
    if recast:
        yield f"The table counts what rounding to another dtype did as a change, as extract does: {_some(recast)}."


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
