"""What an extraction's outcomes come to: a row per low-rank module, the fate of every tensor, totals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratools.engine.context import Outcome
from loratools.engine.execute import Execution

_UNTOLD: Final = frozenset({"fates", "tensors", "products", "sigma2", "evidence"})


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """For the report; see `loratools.verbs.extract.ExtractReport`."""

    modules: tuple[Mapping[str, Any], ...]
    whole: tuple[str, ...]
    left_out: Mapping[str, str]
    identical: tuple[str, ...]
    totals: Mapping[str, Any]

    @classmethod
    def of(cls, execution: Execution) -> Tally:
        """Count the outcomes of all `extract` units, with the ranks that a budget gave them."""
        modules, whole, left_out = [], [], {}
        identical: list[str] = []
        fates: dict[str, int] = {"identical": 0, "low-rank": 0, "whole": 0, "equal in value": 0, "left out": 0}
        for outcome in _extracted(execution):
            if outcome.facts.get("norm"):
                modules.append({"name": outcome.target, **_numbers(outcome.facts)})
            for name, fate in _named_fates(outcome):
                fates[fate.split(":")[0]] += 1
                if fate in {"identical", "equal in value"}:
                    identical.append(name)
                if fate.startswith("whole"):
                    whole.append(name)
                elif fate.startswith("left out"):
                    left_out[name] = fate.removeprefix("left out: ")
        ranked = tuple(module for module in modules if module["rank"])
        return cls(ranked, tuple(whole), left_out, tuple(identical), _totals(modules, fates, execution))


def _named_fates(outcome: Outcome) -> list[tuple[str, str]]:
    """What became of every tensor of a unit, by its name: below the module, or, of experts, its own."""
    own = [
        (f"{outcome.target}.{parameter}" if outcome.target else parameter, fate)
        for parameter, fate in outcome.facts["fates"].items()
    ]
    return [*own, *outcome.facts.get("tensors", {}).items()]


def _numbers(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a report gives for a module."""
    return {key: value for key, value in facts.items() if key not in _UNTOLD}


def _totals(modules: Sequence[Mapping[str, Any]], fates: Mapping[str, int], execution: Execution) -> dict[str, Any]:
    """Counts; captured and residual over all `modules`, those without a rank included; bytes of all weights files."""
    budget, recognised = (_closing_facts(execution, name) for name in ("allocate", "recognise"))
    squares = sum(module["norm"] ** 2 for module in modules)
    left = sum((module["residual"] * module["norm"]) ** 2 for module in modules)
    return {
        "modules": sum(bool(module["rank"]) for module in modules),
        "tensors": dict(fates),
        "rank": sum(module["rank"] for module in modules),
        "captured": 1 - left / squares if squares else None,
        "residual": (left / squares) ** 0.5 if squares else None,
        "bytes": sum(file["bytes"] for file in execution.files if file["name"].endswith(".safetensors")),
        **({"budget": budget} if budget else {}),
        **({"recognised": recognised} if recognised else {}),
    }


def _closing_facts(execution: Execution, operation: str) -> dict[str, Any]:
    """What an allocation or recognition came to, without its modules; empty where there was none."""
    found = execution.of(operation)
    return {key: value for key, value in found[0].facts.items() if key != "modules"} if found else {}


def _extracted(execution: Execution) -> list[Outcome]:
    """The outcomes of the modules; where all of them together decided the ranks, with these."""
    found = [*execution.of("allocate"), *execution.of("recognise")]
    ranks: Mapping[str, Any] = found[0].facts["modules"] if found else {}
    return [_allotted(each, ranks.get(each.target)) for each in execution.of("extract")]


def _allotted(outcome: Outcome, figures: Mapping[str, Any] | None) -> Outcome:
    if figures is None:
        return outcome
    facts = {**outcome.facts, **figures}
    if not facts["rank"]:
        reason = f"left out: rank 0 under the budget, ‖ΔW‖ = {facts['norm']:.4g}"
        for kind in ("fates", "tensors"):
            fates = facts.get(kind, {})
            facts[kind] = {name: reason if fate == "low-rank" else fate for name, fate in fates.items()}
    return dataclasses.replace(outcome, facts=facts)
