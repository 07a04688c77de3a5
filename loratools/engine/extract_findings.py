"""What the outcomes of an extraction say, for its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratools.engine.context import Outcome
from loratools.engine.execute import Execution

_UNTOLD: Final = frozenset({"fates", "tensors", "products", "sigma2"})


def named_fates(outcome: Outcome) -> list[tuple[str, str]]:
    """What became of every tensor of a unit, by its name: below the module, or, of experts, its own."""
    own = [
        (f"{outcome.target}.{parameter}" if outcome.target else parameter, fate)
        for parameter, fate in outcome.facts["fates"].items()
    ]
    return [*own, *outcome.facts.get("tensors", {}).items()]


def numbers(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a report gives for a module."""
    return {key: value for key, value in facts.items() if key not in _UNTOLD}


def totals(modules: Sequence[Mapping[str, Any]], fates: Mapping[str, int], execution: Execution) -> dict[str, Any]:
    """Counts; captured and residual over all `modules`, those without a rank included; bytes of all weights files."""
    budget = budget_facts(execution)
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
    }


def budget_facts(execution: Execution) -> dict[str, Any]:
    """What an allocation came to, without its modules; empty where there was none."""
    found = execution.of("allocate")
    return {key: value for key, value in found[0].facts.items() if key != "modules"} if found else {}


def extracted(execution: Execution) -> list[Outcome]:
    """The outcomes of the modules; where there was a budget, with the ranks that it gave them."""
    found = execution.of("allocate")
    ranks: Mapping[str, Any] = found[0].facts["modules"] if found else {}
    return [_allotted(each, ranks.get(each.target)) for each in execution.of("extract")]


def _allotted(outcome: Outcome, figures: Mapping[str, Any] | None) -> Outcome:
    if figures is None:
        return outcome
    facts = {**outcome.facts, **figures}
    if not figures["rank"]:
        reason = f"left out: rank 0 under the budget, ‖ΔW‖ = {facts['norm']:.4g}"
        for kind in ("fates", "tensors"):
            fates = facts.get(kind, {})
            facts[kind] = {name: reason if fate == "low-rank" else fate for name, fate in fates.items()}
    return dataclasses.replace(outcome, facts=facts)


def findings(modules: Sequence[Mapping[str, Any]], budget: Mapping[str, Any]) -> list[str]:
    """What the numbers say that a user should hear."""
    notes = []
    clipped = [module["name"] for module in modules if module["clipped"]]
    if clipped:
        notes.append(f"The rank is lower than asked for where no more exists: {_some(clipped)}.")
    short = [module for module in modules if not module["reached"]]
    if short:
        worst = min(short, key=lambda module: module["captured"])
        names = [module["name"] for module in short]
        captured = f"{worst['name']} captures {worst['captured']:.4f}"
        notes.append(f"The goal is not reached within the cap and float32: {_some(names)}; {captured}.")
    notes += _of_budget(budget)
    large = [module for module in modules if (module["relative"] or 0) > 1]
    if modules and len(large) > len(modules) // 2:
        notes.append("ΔW is larger than the weights in most modules: is this really the base of the tuned checkpoint?")
    return notes


def _of_budget(budget: Mapping[str, Any]) -> list[str]:
    """Where the budget was not what decided."""
    notes = []
    capped = budget.get("at_max_rank", ())
    if capped:
        notes.append(f"Ranks are held back by --max-rank, not by the budget: {_some(capped)}.")
    elif budget and budget["density"] is None and budget["uniform_rank"] is None:
        notes.append("The budget does not decide: it holds all that the differences have.")
    return notes


def _some(names: Sequence[str]) -> str:
    """One name, or the first of several with their number."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
