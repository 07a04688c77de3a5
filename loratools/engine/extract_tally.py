"""What an extraction's outcomes come to: a row per low-rank module, the fate of every tensor, totals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.engine.context import Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """For the report; see `loratools.verbs.extract.ExtractReport`."""

    modules: tuple[Mapping[str, Any], ...]
    whole: tuple[str, ...]
    left_out: Mapping[str, str]
    identical: tuple[str, ...]
    totals: Mapping[str, Any]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], files: Sequence[Mapping[str, Any]]) -> Tally:
        """Count the outcomes of all `extract` units; `files` are those written."""
        modules, whole, left_out = [], [], {}
        identical: list[str] = []
        fates: dict[str, int] = {"identical": 0, "low-rank": 0, "whole": 0, "equal in value": 0, "left out": 0}
        for outcome in outcomes:
            if outcome.facts.get("rank"):
                modules.append({"name": outcome.target, **_numbers(outcome.facts)})
            for name, fate in _named_fates(outcome):
                fates[fate.split(":")[0]] += 1
                if fate in {"identical", "equal in value"}:
                    identical.append(name)
                if fate.startswith("whole"):
                    whole.append(name)
                elif fate.startswith("left out"):
                    left_out[name] = fate.removeprefix("left out: ")
        return cls(tuple(modules), tuple(whole), left_out, tuple(identical), _totals(modules, fates, files))


def _named_fates(outcome: Outcome) -> list[tuple[str, str]]:
    """What became of every tensor of a unit, by its name: below the module, or, of experts, its own."""
    own = [
        (f"{outcome.target}.{parameter}" if outcome.target else parameter, fate)
        for parameter, fate in outcome.facts["fates"].items()
    ]
    return [*own, *outcome.facts.get("tensors", {}).items()]


def _numbers(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in {"fates", "tensors", "products"}}


def _totals(
    modules: Sequence[Mapping[str, Any]], fates: Mapping[str, int], files: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    squares = sum(module["norm"] ** 2 for module in modules)
    left = sum((module["residual"] * module["norm"]) ** 2 for module in modules)
    return {
        "modules": len(modules),
        "tensors": dict(fates),
        "rank": sum(module["rank"] for module in modules),
        "captured": 1 - left / squares if squares else None,
        "residual": (left / squares) ** 0.5 if squares else None,
        "bytes": sum(file["bytes"] for file in files if file["name"].endswith(".safetensors")),
    }
