"""From two checkpoints to the units of an extraction: which rule applies to which parameter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from loratools.adapters import Adapter, Selection
from loratools.adapters.selection import matches_any
from loratools.checkpoints import Checkpoint, Module, families
from loratools.checkpoints.experts import FUSED_FAMILIES, Stack, in_memory_path, on_disk_paths, routers_of, stacks_of
from loratools.engine import budgets, expert_units, fingerprint, low_rank_forms, memory
from loratools.engine.binding import matrix_shape
from loratools.engine.cards import is_hub_id
from loratools.engine.expert_units import stacked_pairs
from loratools.engine.pairing import Pair, Pairing
from loratools.engine.plan import Input, Unit
from loratools.engine.svd_options import SvdOptions
from loratools.errors import UnsupportedError

_MATRIX = 2


@dataclasses.dataclass(frozen=True)
class ExtractPlanner:
    """Decides the rule of every parameter from headers, names and configuration.

    Attributes:
        pairing: which tensor of one side is which of the other.
        svd: the rank rule.
        save_full: patterns of modules to keep whole.
        only_low_rank: leave out whatever is not a matrix.
        chosen: module paths that are looked at.
        left_out: tensor name → why it is not looked at.
        notes: what was decided.
    """

    pairing: Pairing
    svd: SvdOptions
    save_full: tuple[str, ...]
    only_low_rank: bool
    chosen: tuple[str, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        tuned: Checkpoint,
        svd: SvdOptions,
        selection: Selection,
        save_full: tuple[str, ...],
        only_low_rank: bool,
    ) -> ExtractPlanner:
        """Pair the two checkpoints and choose the modules.

        Raises:
            MismatchError: the two are not of one architecture.
            UsageError: a pattern matches no module.
        """
        pairing = Pairing.of(base, tuned)
        paths = list(pairing.modules)
        chosen = tuple(selection.selected(paths))
        Selection(save_full).selected(paths)
        svd.require_matches(chosen)
        compared = set(chosen)
        left = {
            pair.tuned_name: "excluded by the patterns, not compared"
            for path in paths
            if path not in compared
            for pair in pairing.modules[path].values()
        }
        left |= dict.fromkeys(pairing.only_in_base, "only the base has it")
        return cls(pairing, svd, save_full, only_low_rank, chosen, left, pairing.notes)

    def paths(self) -> list[str]:
        """Every module path of the model, containers included: a dialect may name modules by suffix."""
        known: dict[str, None] = {}
        for path in self.pairing.modules:
            pieces = path.split(".")
            known |= dict.fromkeys(".".join(pieces[:depth]) for depth in range(1, len(pieces) + 1))
        return list(known)

    def units(self) -> list[Unit]:
        """A unit per module; those that may refuse come first, so that a run that fails fails early."""
        kept = [path for path in self.chosen if matches_any(self.save_full, path)]
        stacked = stacked_pairs(self.pairing, self.chosen, kept)
        taken = {member for each in stacked for member in each.members}
        units = [unit for path in self.chosen for unit in self._units(path, taken)]
        units += [expert_units.unit(each, self.svd.of_module(each.path, *each.modules)) for each in stacked]
        return sorted(units, key=lambda unit: not _may_refuse(unit))

    def _units(self, path: str, taken: Collection[tuple[str, str]]) -> Iterator[Unit]:
        """The unit of a module, if anything of it is left."""
        pairs = {name: pair for name, pair in self.pairing.modules[path].items() if (path, name) not in taken}
        if pairs:
            yield self._unit(path, pairs)

    def _unit(self, path: str, pairs: Mapping[str, Pair]) -> Unit:
        module, svd = self.pairing.tuned_module(path), self.svd.of_module(path)
        shared = self.pairing.is_tied_embedding(path) or self._holds_more(path)
        inputs: list[Input] = []
        rules: dict[str, Any] = {}
        for parameter, pair in pairs.items():
            rule = self._rule(path, parameter, pair, module, shared=shared)
            rules[parameter] = {"rule": rule, "tuned": len(inputs), "base": None}
            inputs.append(Input("tuned", pair.tuned.name))
            if pair.base_name is not None and rule != "added":
                rules[parameter]["base"] = len(inputs)
                inputs.append(Input("base", pair.base_name))
        weight = rules.get("weight", {}).get("rule")
        return Unit(
            "extract",
            in_memory_path(path) if self._is_router(path) and self._family in FUSED_FAMILIES else path,
            inputs=tuple(inputs),
            parameters={
                "rules": rules,
                "matrix": budgets.shape_of(rules, pairs),
                "svd": svd.arguments(),
                "transposed": module.stored_transposed,
                "layer": module.kind if module.kind in {"embedding", "conv"} else "linear",
                "shared": shared or not pairs.keys() <= {"weight", "bias"},  # PEFT wraps weight and bias alone
                "together": weight in {"whole", "added"} and not shared and pairs.keys() <= {"weight", "bias"},
            },
            read_bytes=sum(pair.nbytes for pair in pairs.values()),
            write_bytes=sum(_write_bytes(rules[name]["rule"], pair, svd) for name, pair in pairs.items()),
            peak_bytes=max((_peak(rules[name]["rule"], pair, svd) for name, pair in pairs.items()), default=0),
        )

    def _rule(self, path: str, parameter: str, pair: Pair, module: Module, *, shared: bool) -> str:
        whole = "left-out" if self.only_low_rank else "whole"
        if pair.base is None or pair.relation == "reshaped":
            if pair.relation == "new-parameter" and not self.only_low_rank:
                raise UnsupportedError(
                    "The tuned checkpoint gives a module a parameter that the base's module does not have; no adapter "
                    "can add it.",
                    fix="Leave it out with --only-low-rank.",
                    tensor=pair.tuned_name,
                )
            return "left-out" if self.only_low_rank else "added"
        keep = matches_any(self.save_full, path)
        if parameter == "weight" and pair.is_packed and not keep:
            return "refused:quantised"
        if pair.relation == "rows":
            if parameter == "weight" and not shared and not keep:
                return "rows"
            return "rows-whole" if keep or not self.only_low_rank else "left-out"
        if parameter == "weight" and module.kind in {"linear", "conv1d", "embedding", "conv"} and not keep:
            return whole if shared or self._stays_whole(path, module) else "low-rank"
        refused = expert_units.refusal(parameter, pair, module, only_low_rank=self.only_low_rank)
        return "whole" if keep else f"refused:{refused}" if refused else whole

    def _stays_whole(self, path: str, module: Module) -> bool:
        """Whether no low-rank form of PEFT can say what became of a matrix, or not beside the module's bias."""
        biased = not self.only_low_rank and low_rank_forms.is_biased_parameter(path, module, self._family)
        none = low_rank_forms.why_none(module, self.pairing.tuned.config) is not None
        return none or biased or self._is_router(path)

    @property
    def _family(self) -> object:
        return self.pairing.tuned.config.get("model_type")

    def _holds_more(self, path: str) -> bool:
        """Whether the class's router has what the file has beside it (ERNIE): PEFT wants all of a saved module."""
        return self._is_router(path) and f"{path.rpartition('.')[0]}.moe_statics" in self.pairing.modules

    def _is_router(self, path: str) -> bool:
        return path in self._routers

    @functools.cached_property
    def _routers(self) -> frozenset[str]:
        return routers_of(self.pairing.modules)

    def hub_name(self, base_model: str | None) -> str | None:
        """The base's name on the Hub: as given, else what its configuration says, if that is one and no path."""
        found = self.pairing.base.config.get("_name_or_path")
        return base_model or (found if isinstance(found, str) and is_hub_id(found) else None)

    def template(self, base_model: str | None = None, format: str = "peft") -> Adapter:
        """The adapter that comes out, without its updates."""
        config = {"task_type": families.task_type(self.pairing.tuned.config)}
        return Adapter({}, format=format, config=config, base_model=self.hub_name(base_model))

    def complete(self, adapter: Adapter) -> Adapter:
        """What only the factors tell: fan_in_fan_out has to fit; layers that PEFT takes for experts are parameters."""
        kinds = {self.pairing.tuned_module(path).kind for path, update in adapter.items() if update.terms}
        turned = "conv1d" in kinds and "linear" not in kinds
        placed = low_rank_forms.as_parameters(adapter, self._family)
        return dataclasses.replace(
            adapter, updates=MappingProxyType(placed), config={**adapter.config, "fan_in_fan_out": turned}
        )

    def fingerprints(self, paths: Sequence[str]) -> dict[str, str]:
        """Fingerprints of the base's weights of these modules."""
        found = {}
        for path in paths:
            pair = self._weight(path)
            if pair is not None and pair.base is not None:
                found[path] = fingerprint.of(pair.base)
        return found

    def _weight(self, path: str) -> Pair | None:
        """The pair that stands for a path of the adapter: a module's weight, a stack or its first matrix."""
        module, _, parameter = path.rpartition(".")
        modules = self.pairing.modules
        stored = next((each for each in (path, *on_disk_paths(path)) if each in modules), path)
        first = next(iter(self._stacks[path].tensors(0))).removesuffix(".weight") if path in self._stacks else ""
        pairs = modules.get(stored, {}) or modules.get(first, {})
        return pairs.get("weight") or modules.get(module, {}).get(parameter)

    @functools.cached_property
    def _stacks(self) -> Mapping[str, Stack]:
        return stacks_of([f"{path}.weight" for path, pairs in self.pairing.modules.items() if "weight" in pairs])


def _write_bytes(rule: str, pair: Pair, svd: SvdOptions) -> int:
    if rule == "low-rank":
        rows, columns = matrix_shape(pair.tuned.shape)
        return svd.limit(rows, columns) * (rows + columns) * 4
    if rule == "rows":
        rows, columns = pair.tuned.shape
        return svd.limit(rows, columns) * (rows + columns) * 4 + pair.tuned.nbytes
    return 0 if rule == "left-out" or rule.startswith("refused:") else pair.tuned.nbytes


def _peak(rule: str, pair: Pair, svd: SvdOptions) -> int:
    tiles = 2 * min(memory.TILE_BYTES, pair.tuned.nbytes)
    if rule not in {"low-rank", "rows"}:
        return tiles
    from loratools.linalg import workspace_bytes

    assert pair.base is not None
    rows, columns = matrix_shape(pair.base.shape)
    rank = svd.limit(rows, columns)
    workspace = workspace_bytes(rows, columns, rank, preset=svd.effort) + svd.noise_bytes(rows, columns)
    return 4 * tiles + 4 * rows * columns + workspace


def _may_refuse(unit: Unit) -> bool:
    return any(rule["rule"].startswith("refused:") for rule in unit.parameters.get("rules", {}).values())
