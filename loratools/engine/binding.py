"""Which tensor of a checkpoint a module path of an adapter means, and which way round it is stored."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from loratools.adapters import AbstractUpdate, Adapter
from loratools.checkpoints import Checkpoint, Module
from loratools.engine.binding_experts import ParameterBinder
from loratools.engine.sites import Site, Target
from loratools.errors import MismatchError, UnsupportedError

__all__ = ["Bindings", "Renaming", "Site", "Target", "bind", "matrix_shape", "reconcile"]

_LISTED = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Renaming:
    """How names of one side become names of the other: `remove` a prefix, then put `add` in front."""

    remove: str = ""
    add: str = ""

    def apply(self, name: str) -> str:
        """The other side's name; a name without the prefix stays as it is."""
        return self.add + name.removeprefix(self.remove) if name.startswith(self.remove) else name

    def inverse(self) -> Renaming:
        """The way back."""
        return Renaming(self.add, self.remove)

    def __bool__(self) -> bool:
        return bool(self.remove or self.add)

    def __str__(self) -> str:
        if self.remove and self.add:
            return f"{self.remove}* → {self.add}*"
        return f"without the prefix {self.remove!r}" if self.remove else f"with the prefix {self.add!r}"


def reconcile(names: Collection[str], known: Collection[str]) -> Renaming:
    """The prefix to strip from, or put before, `names` so that most of them are in `known`.

    Models saved with and without a head differ by such a prefix. The identity wins ties.

    Raises:
        MismatchError: most of `names` are found under each of several prefixes.
    """
    known = set(known)
    if known.issuperset(names):
        return Renaming()
    prefixes = {*_prefixes(names), *_prefixes(known)}
    candidates = [Renaming(), *(Renaming(remove=prefix) for prefix in sorted(prefixes))]
    candidates += [Renaming(add=prefix) for prefix in sorted(prefixes)]
    found = {candidate: {candidate.apply(name) for name in names} & known for candidate in candidates}
    best = max(candidates, key=lambda candidate: len(found[candidate]))
    rivals = [each for each in candidates if len(found[each]) == len(found[best]) and found[each] != found[best]]
    if best and rivals and 2 * len(found[best]) > len(names):
        raise MismatchError(
            f"The names of one side are found on the other {best}, and {rivals[0]}: which is meant cannot be told.",
            fix="Rename them so that they are found as they are.",
            first=next(iter(names)),
        )
    return best


def _prefixes(names: Iterable[str]) -> set[str]:
    """Leading components, one and two deep, that occur often enough to be a base model's attribute."""
    counts: Counter[str] = Counter()
    for name in names:
        pieces = name.split(".")
        for depth in (1, 2):
            if len(pieces) > depth:
                counts[".".join(pieces[:depth]) + "."] += 1
    return {prefix for prefix, _ in counts.most_common(16)}


@dataclasses.dataclass(frozen=True, slots=True)
class Bindings:
    """Every module path of an adapter with its target."""

    targets: Mapping[str, Target]
    renaming: Renaming
    notes: tuple[str, ...]


def bind(adapter: Adapter, base: Checkpoint) -> Bindings:
    """Find the tensors that `adapter` is about.

    Raises:
        MismatchError: modules are missing from the base, or shapes differ: another model's adapter.
        UnsupportedError: a module of a kind that cannot be updated yet, by name.
    """
    modules = base.modules
    head = base.tied_head
    known = set(modules) | ({head[1].removesuffix(".weight")} if head else set())
    parameters = ParameterBinder(adapter, base)
    renaming = reconcile(list(adapter), known | parameters.known)
    notes = [f"Module paths of {adapter.name} are read {renaming}: the base names them so."] if renaming else []
    targets: dict[str, Target] = {}
    missing: list[str] = []
    for path, update in adapter.items():
        name = renaming.apply(path)
        if parameters.holds(name, update):
            targets[path] = parameters.target(path, update, name)
        elif name in known and update.target:
            targets[path] = _target(path, update, name, _module(name, modules, head), adapter, notes)
        elif update.changes_weight or update.added_rows or update.patches or not _declared(path, adapter):
            missing.append(path)
        else:
            targets[path] = Target(path, None)
            notes.append(f"{path} is added: the base does not have it.")
    if missing:
        raise MismatchError(
            f"{len(missing)} of the adapter's {len(adapter)} modules are not in the base.",
            fix="Is this the base that the adapter was made for?",
            adapter=adapter.name,
            base=base.name,
            missing=", ".join(missing[:_LISTED]) + (", …" if len(missing) > _LISTED else ""),
        )
    return Bindings(targets, renaming, tuple(dict.fromkeys(notes)))


def _module(name: str, modules: Mapping[str, Module], head: tuple[str, str] | None) -> Module:
    """The module; a tied head that is not stored is seen as a Linear with the embedding's weight."""
    if name in modules:
        return modules[name]
    assert head is not None
    embedding = modules[head[0].removesuffix(".weight")]
    return Module(name, "linear", {"weight": embedding.parameters["weight"]}, "inferred")


def _declared(path: str, adapter: Adapter) -> bool:
    """Whether the adapter itself says that it brings the module: `modules_to_save`."""
    named = adapter.config.get("modules_to_save") or []
    return any(isinstance(name, str) and path.endswith(name) for name in named)


def _target(path: str, update: AbstractUpdate, name: str, module: Module, adapter: Adapter, notes: list[str]) -> Target:
    for parameter in (*update.replaced, *update.added_rows, *update.patches, *update.offsets):
        if parameter not in module.parameters:
            raise MismatchError(f"The adapter gives a {parameter}, which the base's module does not have.", module=path)
    if not update.changes_weight:
        return Target(name, module)
    target = Target(name, module)
    transposed = _transposed(path, update, module, adapter, notes)
    return dataclasses.replace(target, sites=(Site(target.tensor(update.target), transposed),))


def _transposed(path: str, update: AbstractUpdate, module: Module, adapter: Adapter, notes: list[str]) -> bool:
    """Whether the stored weight is (in, out): told by shapes, then by the base's facts, then by the flag."""
    shape = update.shape
    weight = update.replaced.get(update.target, module.parameters.get(update.target))
    if shape is None or weight is None or module.kind in {"experts", "quantised"}:
        raise UnsupportedError(f"A {update.kind} update of {module.kind} weights is not merged yet.", module=path)
    stored = matrix_shape(weight.shape)
    if update.layer == "embedding":
        straight, turned = False, stored == shape[::-1]
    else:
        straight, turned = stored == shape, stored == shape[::-1] and len(weight.shape) == len(shape)
    if straight and turned:
        return _square(path, module, adapter, notes)
    if not straight and not turned:
        raise MismatchError(
            f"The update has shape {shape}, the base's weight {tuple(weight.shape)}.",
            fix="Is this the base that the adapter was made for?",
            module=path,
            adapter=adapter.name,
        )
    return turned


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The (out, in) view of a stored weight: a kernel (out, in, k, …) is (out, in·k·…)."""
    return shape if len(shape) <= 2 else (shape[0], math.prod(shape[1:]))  # noqa: PLR2004


def _square(path: str, module: Module, adapter: Adapter, notes: list[str]) -> bool:
    if module.evidence == "confirmed":
        return module.kind == "conv1d"
    flag = adapter.config.get("fan_in_fan_out") is True
    if flag:
        notes.append(f"{path} is square; fan_in_fan_out decides that it is stored (in, out).")
    return flag
