"""Which tensor of a checkpoint a module path of an adapter means, and which way round it is stored."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from loratools.adapters import AbstractUpdate, Adapter
from loratools.adapters.experts import Stacked
from loratools.adapters.sides import AbstractSided
from loratools.checkpoints import Checkpoint, Module, owner
from loratools.checkpoints.experts import on_disk_paths, stacks_of
from loratools.checkpoints.renamed import is_renamed
from loratools.engine.binding_experts import apart_sites, piece_site, stacked_site
from loratools.engine.sites import Site
from loratools.errors import MismatchError, UnsupportedError

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
class Target:
    """The module of the checkpoint that an update is for; `added`, under its own name, where the base has none."""

    name: str
    module: Module | None
    sites: tuple[Site, ...] = ()

    @property
    def added(self) -> bool:
        """Whether the adapter brings the module along."""
        return self.module is None

    def has(self, parameter: str) -> bool:
        """Whether the base's module has this parameter."""
        return self.module is not None and parameter in self.module.parameters

    def tensor(self, parameter: str) -> str:
        """The tensor name of a parameter; of the target itself, where that is a parameter and none is named."""
        inside = self.module.name if self.module is not None else self.name
        return f"{inside}.{parameter}" if inside and parameter else parameter or self.name


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
    parameters = any(not update.target for update in adapter.values())
    stacks = stacks_of(list(base)) if parameters else {}
    renaming = reconcile(list(adapter), known | set(base) | set(stacks) if parameters else known)
    notes = [f"Module paths of {adapter.name} are read {renaming}: the base names them so."] if renaming else []
    targets: dict[str, Target] = {}
    missing: list[str] = []
    for path, update in adapter.items():
        name = renaming.apply(path)
        if not update.target and name in base:
            targets[path] = _parameter_target(path, update, name, base, adapter)
        elif isinstance(update, Stacked) and name in stacks:
            module = Module(name, "experts", {}, "inferred")
            _require_parameters(path, update, module)
            targets[path] = Target(name, module, apart_sites(path, update, stacks[name], base, adapter))
        elif (name := next((each for each in (name, *on_disk_paths(name)) if each in known), name)) in known:
            targets[path] = _target(path, update, name, _module(name, modules, head), adapter, notes)
        elif site := piece_site(path, update, renaming.apply(path), base):
            targets[path] = Target(site.tensor, base.modules[owner(site.tensor)[0]], (site,))
        elif update.changes_weight or update.added_rows or update.patches or not _declared(path, adapter):
            missing.append(path)
        else:
            targets[path] = Target(path, None)
            notes.append(f"{path} is added: the base does not have it.")
    if missing:
        raise _missing(missing, adapter, base)
    return Bindings(targets, renaming, tuple(dict.fromkeys(notes)))


def _missing(missing: list[str], adapter: Adapter, base: Checkpoint) -> MismatchError:
    family = base.config.get("model_type")
    renamed = (
        f"transformers 5 calls modules of {family} otherwise than the file when it loads it. Adapters that were made "
        "there are not mapped to the file's names yet: merge this one in PEFT."
    )
    return MismatchError(
        f"{len(missing)} of the adapter's {len(adapter)} modules are not in the base.",
        fix=renamed if is_renamed(family) else "Is this the base that the adapter was made for?",
        adapter=adapter.name,
        base=base.name,
        missing=", ".join(missing[:_LISTED]) + (", …" if len(missing) > _LISTED else ""),
    )


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
    _require_parameters(path, update, module)
    if not update.changes_weight:
        return Target(name, module)
    target = Target(name, module)
    transposed = _transposed(path, update, module, adapter, notes)
    return dataclasses.replace(target, sites=(Site(target.tensor(update.target), transposed),))


def _require_parameters(path: str, update: AbstractUpdate, module: Module) -> None:
    offsets = [name for name, offset in update.offsets.items() if not offset.multiplies]
    for parameter in (*update.replaced, *update.added_rows, *update.patches, *offsets):
        if parameter not in module.parameters:
            raise MismatchError(f"The adapter gives a {parameter}, which the base's module does not have.", module=path)


def _parameter_target(path: str, update: AbstractUpdate, name: str, base: Checkpoint, adapter: Adapter) -> Target:
    """The target of an update whose path is that of a parameter."""
    stored, module = base[name].shape, base.modules[owner(name)[0]]
    _require_parameters(path, update, module)
    if isinstance(update, Stacked):
        return Target(name, module, (stacked_site(path, update, name, base, adapter),))
    if update.shape is None or stored != update.shape:
        raise MismatchError(
            f"The update has shape {update.shape}, the base's parameter {stored}.",
            fix="Is this the base that the adapter was made for?",
            module=path,
        )
    return Target(name, module, (Site(name),))


def _transposed(path: str, update: AbstractUpdate, module: Module, adapter: Adapter, notes: list[str]) -> bool:
    """Whether the stored weight is (in, out): told by shapes, then by the base's facts, then by the flag."""
    shape = update.shape
    weight = update.replaced.get(update.target, module.parameters.get(update.target))
    if (shape is None and not update.takes_shape) or weight is None or module.kind in {"experts", "quantised"}:
        raise UnsupportedError(f"A {update.kind} update of {module.kind} weights is not merged yet.", module=path)
    update.check_weight(weight.shape)
    stored = matrix_shape(weight.shape)
    if update.layer == "embedding":
        straight, turned = False, update.fits(stored[::-1])
    else:
        straight, turned = update.fits(stored), update.fits(stored[::-1]) and len(weight.shape) == 2  # noqa: PLR2004
    _require_kernel(path, update, weight.shape, adapter)
    if straight and turned:
        return _square(path, module, adapter, notes)
    if not straight and not turned:
        raise MismatchError(
            f"The {update.kind} update has shape {shape or 'unknown'}, the base's weight {tuple(weight.shape)}.",
            fix="Is this the base that the adapter was made for?",
            module=path,
            adapter=adapter.name,
        )
    return turned


def _require_kernel(path: str, update: AbstractUpdate, stored: tuple[int, ...], adapter: Adapter) -> None:
    """Refuse a convolution of another kernel that has as many entries."""
    kernel = update.kernel
    if kernel and stored[2:] != kernel:
        raise MismatchError(
            f"The update is for a kernel {kernel}, the base's weight is {tuple(stored)}.",
            fix="Is this the base that the adapter was made for?",
            module=path,
            adapter=adapter.name,
        )


def shaped(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter with every update told the shape and layer of the weight that it is for, where it does not say them.

    Raises:
        MismatchError, UnsupportedError: see `bind`.
    """
    if not any(update.takes_shape or isinstance(update, AbstractSided) for update in adapter.values()):
        return adapter
    known = {}
    for path, target in bind(adapter, base).targets.items():
        update = adapter[path]
        for site in target.sites:
            whole = base[site.tensor].shape
            stored = matrix_shape(whole)
            if update.takes_shape:
                rows, columns = reversed(stored) if site.transposed else stored
                update = update.of_shape((rows, columns))
            elif isinstance(update, AbstractSided):
                update = update.of_layer("conv" if len(whole) > len(stored) else "linear", whole[2:])
        known[path] = update
    return dataclasses.replace(adapter, updates=MappingProxyType(known))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The (out, in) view of a stored weight: a kernel (out, in, k, …) is (out, in·k·…)."""
    return shape if len(shape) <= 2 else (shape[0], math.prod(shape[1:]))  # noqa: PLR2004


def _square(path: str, module: Module, adapter: Adapter, notes: list[str]) -> bool:
    if module.evidence == "confirmed":
        return module.kind == "conv1d"
    flag = adapter.config.get("fan_in_fan_out") is True
    if flag:
        notes.append(f"{path}: its shape does not tell; fan_in_fan_out decides that it is stored (in, out).")
    return flag
