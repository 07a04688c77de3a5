"""Lower ranks for the modules of adapters: the rule as it is asked for, what it adds to units, what came of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

from loratools.adapters import AbstractUpdate, Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import budgets
from loratools.engine.activations import SOURCE, unweighted, weigh_updates
from loratools.engine.budgets import Pool, Work
from loratools.engine.context import Outcome
from loratools.engine.execute import Execution
from loratools.engine.extract_advice import findings
from loratools.engine.plan import Unit
from loratools.engine.planning import Run, RunOptions
from loratools.engine.svd_options import AUTO, RULES, SvdOptions
from loratools.errors import UnsupportedError, UsageError
from loratools.files import Activations, open_activations
from loratools.files.locate import Source
from loratools.storage.headers import header_bytes

CHOICE: Final = "Give --rank, --energy, --error, --budget or another rule."
DECIDED: Final = {
    "truncate": "ΔW becomes its best approximation of the rank that the rule chooses: alpha = r, √S on each side",
    "budget": "the weights file has at most so many bytes: σ² per byte decides which ranks of all modules it holds",
    "uniform-rank": "every module gets the largest rank that all can have within the budget, with zeros",
}
_UNTOLD: Final = frozenset({"sigma2", "products"})
_ROW: Final = 48
"""Working bytes per entry of the concatenated factors: in float64, balanced, their QR and what that works on."""
_CORE: Final = 64
"""And per entry of the core: itself, its singular vectors, and what their decomposition works on."""
_OUT: Final = 56
"""And per entry of the new factors: in float64 and float32, and what rounding changed."""


class RankOptions(TypedDict, total=False):
    """How much of ΔW to keep, as keyword arguments of a verb.

    Attributes:
        rank: the rank of every module, clipped to what exists.
        energy: or the least rank with captured ≥ energy, per module.
        error: or the least rank with residual ≤ error, per module.
        budget: or bytes of the weights file, header included: the ranks that leave the least over all.
        uniform_rank: with a budget, the largest rank that all modules can have, filled up with zeros.
        max_rank: cap on a rank that a rule chooses, 256; an explicit one is not limited.
        sv_ratio: or all singular values of at least σ_1/sv_ratio.
        sv_cumulative: or the least rank whose singular values have this share of their sum.
        sv_fro: or the least rank with ‖Δ̂‖ ≥ sv_fro·‖ΔW‖.
        knee: or what comes before the knee of the singular values.
        rank_pattern: ranks of the modules that a pattern matches, whatever the rule; the first that matches decides.
    """

    rank: int | None
    energy: float | None
    error: float | None
    budget: int | None
    uniform_rank: bool
    max_rank: int
    sv_ratio: float | None
    sv_cumulative: float | None
    sv_fro: float | None
    knee: bool
    rank_pattern: Mapping[str, int] | None


class RankedRunOptions(RankOptions, RunOptions, total=False):
    """Of a verb that lowers ranks and writes."""


def parted(options: RankedRunOptions) -> tuple[RankOptions, Run]:
    """How much to keep, and how to run."""
    ranks = {name: value for name, value in options.items() if name in RankOptions.__annotations__}
    others = {name: value for name, value in options.items() if name not in ranks}
    return ranks, Run(**others)  # type: ignore[return-value,arg-type]


@dataclasses.dataclass(frozen=True, slots=True)
class Reduction:
    """A rule, and what is known of the modules' inputs, if anything: then it is meant in the norm that these make."""

    svd: SvdOptions
    activations: Activations | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Lowered(Work):
    """An adapter's units, what closes them, upper bounds of what is written and kept in between, and what to say."""

    notes: tuple[str, ...] = ()


def asked(options: RankOptions, activations: Source | None) -> Reduction | None:
    """What is asked for, checked; None where there is no rule.

    Raises:
        UsageError: see `rule_of`; or activations without a rule, or with a budget.
        LoratoolsError: the activations cannot be read.
    """
    svd = rule_of(options)
    if svd is None:
        if activations is not None:
            raise UsageError("Activations weigh what a truncation leaves.", fix=CHOICE)
        return None
    if activations is None:
        return Reduction(svd)
    svd.require_weighable()
    return Reduction(svd, open_activations(activations))


def sources(rule: Reduction | None) -> dict[str, Checkpoint | Adapter]:
    """What is read beside the adapters, by the id that units use."""
    return {SOURCE: rule.activations.source} if rule is not None and rule.activations is not None else {}


def rule_of(options: RankOptions) -> SvdOptions | None:
    """The one rule that is asked for, checked; None where there is none.

    Raises:
        UsageError: several rules, one out of its range; `auto`; what only goes with a rule, without one.
    """
    given: dict[str, Any] = dict(options)
    patterns = tuple((given.pop("rank_pattern", None) or {}).items())
    asked = {name: given.get(name) for name in (*RULES, "budget")}
    if not any(value is not None and value is not False for value in asked.values()):
        if patterns or given.get("uniform_rank"):
            what = (
                "Ranks for some modules need a rule for the others" if patterns else "One rank for all needs a budget"
            )
            raise UsageError(f"{what}.", fix="Give --rank, --energy, --error, --budget or another rule.")
        return None
    if given.get("rank") == AUTO:
        raise UsageError(
            "--rank auto looks for the rounding noise of a checkpoint, which an adapter does not have.",
            fix="Give a number, or another rule.",
        )
    fields = {"rank": None, "energy": None, "error": None, "max_rank": 256, **given}
    return SvdOptions(**fields, preset="default", seed=0, rank_pattern=patterns).checked(1)


def told(rule: Reduction | None) -> dict[str, Any]:
    """The rule as a plan and a report repeat it."""
    if rule is None:
        return {}
    fields = {name: getattr(rule.svd, name) for name in (*RULES, "budget", "uniform_rank", "max_rank")}
    name = rule.activations.source.name if rule.activations is not None else None
    return {**fields, "rank_pattern": dict(rule.svd.rank_pattern), "activations": name}


def require_products(path: str, update: AbstractUpdate) -> None:
    """Refuse an update whose ΔW is no sum of products.

    Raises:
        UnsupportedError: names the kind.
    """
    if update.changes_weight and not update.products:
        why = "depends on the base" if update.depends_on_base else "is no sum of products of factors"
        raise UnsupportedError(
            f"The rank of an update of kind {update.kind} cannot be lowered: its ΔW {why}.",
            fix="Exclude these modules.",
            module=path,
        )


def planned(
    units: Sequence[Unit], rule: Reduction | None, updates: Mapping[str, AbstractUpdate], *, full: bool = False
) -> Lowered:
    """The units with the rule in those of `updates`, what closes them, and upper bounds of what is written.

    Args:
        units: of all modules.
        rule: None: nothing is truncated.
        updates: the modules whose rank is lowered, as they are added up.
        full: what is truncated may have as many ranks as its shape allows, whatever those of the updates.

    Raises:
        UsageError: a pattern for ranks matches no module; headers show that a budget is too small.
        LoratoolsError: activations that are not of this model.
    """
    if rule is None:
        written = sum(unit.write_bytes for unit in units)
        return Lowered(tuple(units), (), written, written)
    found = {path: update for path, update in updates.items() if update.products}
    rule.svd.require_matches(list(found))
    begun = [
        _lowered(unit, rule.svd, found[unit.target], full=full) if unit.target in found else unit for unit in units
    ]
    notes: tuple[str, ...] = ()
    if rule.activations is not None:
        weighing = weigh_updates(begun, found, rule.activations)
        begun, notes = list(weighing.units), weighing.notes
    written = sum(unit.write_bytes for unit in begun)
    if rule.svd.budget is None:
        return Lowered(tuple(begun), (), written, written, notes)
    pool = Pool(rule.svd.budget, rule.svd.max_rank, rule.svd.uniform_rank)
    _require_room(begun, pool, [unit for unit in begun if budgets.matrix_of(unit) is None])
    chosen = {"rule": "uniform-rank" if pool.uniform else "budget"}
    closing = Unit("allocate", budgets.TARGET, parameters={**dataclasses.asdict(pool), "rules": {"ranks": chosen}})
    return Lowered(tuple(begun), (closing,), min(written, pool.budget), written, notes)


def _lowered(unit: Unit, svd: SvdOptions, update: AbstractUpdate, *, full: bool) -> Unit:
    """A unit whose update is truncated, with what that takes."""
    assert update.shape is not None
    out, into = update.shape
    held = min(out, into) if full else sum(term.rank for term in update.products)
    own = svd.of_module(unit.target)
    rank = min(held, own.limit(out, into))
    least = min(out, into, held)
    beside = sum(ref.nbytes for ref in update.tensors) - sum(ref.nbytes for ref in update.factors)
    offsets = sum(4 * offset.vector.spec.numel for offset in update.offsets.values())
    begun = dataclasses.replace(
        unit,
        parameters={
            **unit.parameters,
            "rules": {"weight": {"rule": "truncate"}},
            "matrix": [out, into, 1, held],
            "svd": own.arguments(),
        },
        write_bytes=4 * rank * (out + into) + offsets + max(beside, 0),
        peak_bytes=_ROW * held * (out + into) + _CORE * least * max(held, least) + _OUT * rank * (out + into),
    )
    return budgets.at_rank(begun, rank) if own.budget is not None else begun


def _require_room(units: Sequence[Unit], pool: Pool, whole: Sequence[Unit]) -> None:
    """Refuse a budget that headers show to be too small: for what is stored in any case, or for any rank."""
    costs = [found.cost for unit in units if (found := budgets.matrix_of(unit))]
    sure = sum(unit.read_bytes for unit in whole)
    least = len(header_bytes([], {})[0]) + sure + min(costs, default=0)
    if pool.budget < least:
        raise budgets.too_small(pool.budget, least, sure, "at least ")


def allotted(outcomes: Sequence[Outcome], execution: Execution) -> list[Outcome]:
    """The modules' outcomes; where all of them together decided the ranks, with these."""
    found = execution.of("allocate")
    ranks: Mapping[str, Any] = found[0].facts["modules"] if found else {}
    return [_at(each, ranks[each.target]) if each.target in ranks else each for each in outcomes]


def _at(outcome: Outcome, figures: Mapping[str, Any]) -> Outcome:
    rank = figures["rank"]
    scaling = {"alpha": float(rank), "scaling": 1.0} if rank else {"alpha": None, "scaling": None}
    return dataclasses.replace(outcome, facts={**outcome.facts, **figures, **scaling})


def why_left(outcome: Outcome) -> str:
    """Why a module whose products have rank 0 is not in the output."""
    norm = outcome.facts.get("norm")
    return f"rank 0 by the rule, ‖ΔW‖ = {norm:.4g}" if norm else "its rank is 0"


def row(outcome: Outcome) -> dict[str, Any]:
    """What a report gives for a module."""
    return {key: value for key, value in outcome.facts.items() if key not in _UNTOLD}


def totals(outcomes: Sequence[Outcome], execution: Execution) -> dict[str, Any]:
    """Captured and residual over all truncated modules, those without a rank included; what a budget came to."""
    every = [outcome.facts for outcome in outcomes if "residual" in outcome.facts]
    if not every:
        return {}
    squares = math.fsum(facts["norm"] ** 2 for facts in every)
    left = math.fsum((facts["residual"] * facts["norm"]) ** 2 for facts in every)
    budget = [outcome.facts for outcome in execution.of("allocate")]
    return {
        "captured": 1 - left / squares if squares else None,
        "residual": math.sqrt(left / squares) if squares else None,
        **({"budget": {key: value for key, value in budget[0].items() if key != "modules"}} if budget else {}),
    }


def notes(modules: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], rule: Reduction | None) -> list[str]:
    """What is known only now."""
    if rule is None:
        return []
    truncated = [{"relative": None, **module} for module in modules if "residual" in module]
    file = rule.activations.source.name if rule.activations is not None else None
    return [*findings(truncated, figures), *unweighted(truncated, file)]
