"""All modules of an extraction with `--rank auto`: what the difference is, and which rank that gives each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapters.leading import leading
from loratools.engine import recognition
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.cutting import numbers
from loratools.engine.plan import Unit
from loratools.engine.recognition import Evidence, Recognition
from loratools.errors import InternalError

_UNCHANGED = ("identical", "equal in value", "whole: unchanged")


@dataclasses.dataclass(frozen=True, slots=True)
class _Module:
    """A module whose rank is `auto`, with what its unit found."""

    unit: Unit
    facts: Mapping[str, Any]

    @property
    def evidence(self) -> list[Evidence]:
        return [Evidence.of(self.unit.target, told) for told in self.facts["evidence"]]

    @property
    def svd(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.unit.parameters["svd"]
        return found

    def by(self, rule: str, wanted: Mapping[str, Any]) -> Unit:
        """The same unit by another rule; what was found goes along, so that the decision stays what it is."""
        told = {name: self.facts[name] for name in ("evidence", "noise_floor", "noise_share", "above_noise")}
        svd = {**{name: value for name, value in self.svd.items() if name != "rank"}, **wanted}
        parameters = {**self.unit.parameters, "svd": svd, "carried": {**told, "rank_rule": rule}}
        return dataclasses.replace(self.unit, parameters=parameters)


def recognise(unit: Unit, context: Context) -> Outcome:
    """Decide what the difference is; give every module its rank, or say which have to be decomposed anew for that."""
    modules = [_Module(each, outcome.facts) for each, outcome in context.done if outcome.facts.get("evidence")]
    evidence = [each for module in modules for each in module.evidence]
    found = recognition.recognise(evidence, _beside(context))
    again: list[Unit] = []
    figures: dict[str, Mapping[str, Any]] = {}
    for module in modules:
        if found.what == "full fine-tune":
            again += _by_energy(module, float(unit.parameters["energy"]))
        elif module.unit.target in found.ranks:
            again += _at_rank(module, found, figures, context)
    if again:
        return Outcome(unit.target, unit.operation, "decomposed again", again=tuple(again))
    return Outcome(unit.target, unit.operation, "recognised", _facts(found, figures))


def _by_energy(module: _Module, energy: float) -> Sequence[Unit]:
    """A module of a full fine-tune, unless that is what its unit did on its own."""
    if str(module.facts["rank_rule"]).startswith("energy"):
        return ()
    return (module.by(f"energy {energy}: a full fine-tune", {"energy": energy}),)


def _at_rank(
    module: _Module, found: Recognition, figures: dict[str, Mapping[str, Any]], context: Context
) -> Sequence[Unit]:
    """A module at the rank that was recognised: cut, or decomposed again where more is wanted than there is."""
    target, have = module.unit.target, int(module.facts["rank"])
    rank = found.ranks[target]
    rule = f"common rank {rank}" if rank == found.shared[target] else f"own end at {rank}"
    if have < rank and module.svd.get("rank") != rank:
        return (module.by(rule, {"rank": rank}),)
    figures[target] = {"rank_rule": rule}
    if have > rank:
        update = context.sink.held(target)
        if update is None:
            raise InternalError("A module with a rank has no update.", module=target)
        context.sink.update(target, leading(target, update, rank))
        figures[target] = {**numbers(module.facts, rank), "rank_rule": rule}
    return ()


def _beside(context: Context) -> tuple[int, int]:
    """Of the vectors whose modules have no changed matrix, how many have changed, and how many there are."""
    changed = there = 0
    for unit, outcome in context.done:
        fates: Mapping[str, str] = outcome.facts.get("fates", {})
        vectors, moved = 0, 0
        for parameter, rule in unit.parameters.get("rules", {}).items():
            if rule["base"] is None or parameter not in fates:
                continue
            differs = not fates[parameter].startswith(_UNCHANGED)
            if len(context.tensor(unit.inputs[rule["tuned"]]).shape) <= 1:
                vectors, moved = vectors + 1, moved + differs
            elif differs:
                break
        else:
            changed, there = changed + moved, there + vectors
    return changed, there


def _facts(found: Recognition, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"what": found.what, "said": found.said, "shared": len(found.shared), "of": found.of, "modules": figures}
