"""What a set of adapters does to a checkpoint, tensor by tensor: from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratools.adapters import AbstractUpdate, Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import fingerprint
from loratools.engine.binding import Bindings, Renaming, Target, bind
from loratools.engine.sites import Site
from loratools.engine.tensor_change import TensorChange, factor_elements
from loratools.engine.ties import changes_both, mirror, untie
from loratools.errors import InternalError, MismatchError, UnsupportedError
from loratools.tensors import COMPUTABLE, TensorSpec

_ONE_OF_THEM: Final = "Merge one of them, and stack the others without it (--exclude)."


@dataclasses.dataclass(frozen=True, slots=True)
class AddedTensor:
    """A tensor that an adapter brings along and the base does not have."""

    source: str
    module: str
    parameter: str
    spec: TensorSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """All of it.

    Attributes:
        tensors: base tensor name → change.
        added: output tensor name → what is added.
        untied: (embedding, head) where the head must become a tensor of its own, with the head's change.
        renaming: how output names differ from the base's, because an added head needs the prefix.
        notes: what was decided.
    """

    tensors: Mapping[str, TensorChange]
    added: Mapping[str, AddedTensor]
    untied: tuple[str, str, TensorChange] | None
    renaming: Renaming
    notes: tuple[str, ...]


def source_id(index: int) -> str:
    """The id of the index-th adapter in a plan."""
    return f"adapter{index}"


def collect(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    merged: bool = False,
    known: bool = False,
) -> Changes:
    """Bind every adapter and gather what it does.

    Args:
        base: the checkpoint.
        adapters: the adapters.
        weights: one each.
        merged: the checkpoint has the adapters in it already, so that its fingerprint says nothing.
        known: they were merged into this base before: fingerprints, which have to be read, need not be compared.

    Raises:
        MismatchError: an adapter does not belong to this base.
        UnsupportedError: weights in a dtype that is not computed with.
    """
    tensors: dict[str, TensorChange] = {}
    added: dict[str, AddedTensor] = {}
    notes: list[str] = []
    renaming = Renaming()
    alone, tied_by = False, []
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        bindings = bind(adapter, base)
        notes += [*adapter.notes, *bindings.notes]
        notes += () if adapter else [f"{adapter.name} is empty: it changes nothing."]
        if not merged:
            _require_fitting(adapter, bindings)
            notes += () if known else fingerprint.compare(adapter, bindings, base)
        if any(target.added for target in bindings.targets.values()):
            renaming = bindings.renaming.inverse()
            notes += () if weight == 1 else [f"{adapter.name}: modules that the base does not have are added whole."]
        for path, target in bindings.targets.items():
            _gather(source_id(index), path, adapter[path], target, weight, tensors, added)
        both = changes_both(adapter, bindings, base)
        alone |= both is False
        if both and base.tied_head is not None:
            tied_by.append(source_id(index))
            notes.append(f"{base.tied_head[1]} is tied to {base.tied_head[0]}: one update, applied once.")
    for source in tied_by:  # once all are gathered: the order of adapters does not matter
        assert base.tied_head is not None
        mirror(source, base.tied_head, tensors)
    _require_there(base, tensors)
    untied = untie(base, tensors, alone=alone, notes=notes)
    _require_computable(base, tensors)
    return Changes(tensors, added, untied, renaming, tuple(dict.fromkeys(notes)))


def _gather(  # noqa: PLR0913, PLR0917
    source: str,
    path: str,
    update: AbstractUpdate,
    target: Target,
    weight: float,
    tensors: dict[str, TensorChange],
    added: dict[str, AddedTensor],
) -> None:
    for parameter, ref in update.replaced.items():
        name = target.tensor(parameter)
        if target.added:
            if name in added:
                raise UnsupportedError("Two adapters bring this module along.", fix=_ONE_OF_THEM, module=path)
            added[name] = AddedTensor(source, path, parameter, ref.spec.renamed(name))
            continue
        change = tensors.setdefault(name, TensorChange())
        change.wholes.append({"source": source, "module": path, "parameter": parameter, "weight": weight})
    _gather_parts(source, path, update, target, weight, tensors)
    for site in target.sites:
        _add_term(source, path, update, site, weight, tensors.setdefault(site.tensor, TensorChange()))


def _gather_parts(
    source: str, path: str, update: AbstractUpdate, target: Target, weight: float, tensors: dict[str, TensorChange]
) -> None:
    """Rows that are appended or replaced, and what is added to biases."""
    for parameter, ref in update.added_rows.items():
        change = tensors.setdefault(target.tensor(parameter), TensorChange())
        if change.rows is not None:
            raise UnsupportedError("Two adapters append rows to one parameter.", module=path)
        change.rows = {"source": source, "module": path, "parameter": parameter, "count": ref.shape[0]}
    for kind, parameters in (("patches", update.patches), ("offsets", update.offsets)):
        for parameter in parameters:
            if kind == "offsets" and update.offsets[parameter].multiplies and not target.has(parameter):
                continue  # nothing to multiply
            change = tensors.setdefault(target.tensor(parameter), TensorChange())
            getattr(change, kind).append({"source": source, "module": path, "parameter": parameter, "weight": weight})


def _add_term(source: str, path: str, update: AbstractUpdate, site: Site, weight: float, change: TensorChange) -> None:
    if change.terms and (change.transposed, change.experts) != (site.transposed, site.experts):
        raise MismatchError(
            "The adapters disagree about which way round this weight is stored.",
            fix="One of them has the wrong fan_in_fan_out in its adapter_config.json.",
            module=path,
        )
    term: dict[str, Any] = {"source": source, "module": path, "weight": weight}
    if site.expert is not None and site.experts is not None:
        term |= {"only": site.expert, "at": list(site.rows or ())}
    elif site.expert is not None:
        term |= {"expert": site.expert, "rows": list(site.rows) if site.rows else None}
    change.terms.append(term)
    change.transposed, change.experts = site.transposed, site.experts
    change.factor_elements += update.effort * factor_elements(update)
    if not update.terms and site.experts is None and site.expert is None:
        change.needs(update.span)


def _require_fitting(adapter: Adapter, bindings: Bindings) -> None:
    """Refuse a whole parameter of another shape than the one that it replaces, and rows of another width."""
    for path, target in bindings.targets.items():
        known = target.module.parameters if target.module is not None else {}
        whole = [(name, ref.spec, known[name]) for name, ref in adapter[path].replaced.items() if name in known]
        given: list[tuple[str, Any, Any]] = [(name, ref.shape, there.shape) for name, ref, there in whole]
        given += [(name, ref.dtype, there.dtype) for name, ref, there in whole if there.dtype not in COMPUTABLE]
        given += [(name, ref.shape[1:], known[name].shape[1:]) for name, ref in adapter[path].added_rows.items()]
        given += [(name, each.rows.shape[1:], known[name].shape[1:]) for name, each in adapter[path].patches.items()]
        given += [
            (name, each.vector.shape, known[name].shape)
            for name, each in adapter[path].offsets.items()
            if name in known
        ]
        for name, patch in adapter[path].patches.items():
            if name in known and max(patch.indices, default=-1) >= known[name].shape[0]:
                raise MismatchError(
                    f"The adapter replaces row {max(patch.indices)} of {known[name].shape[0]} of the base's {name}.",
                    fix="Is this the base that the adapter was made for? A vocabulary may have been resized.",
                    module=path,
                )
        for name, shape, wanted in given:
            if shape != wanted:
                raise MismatchError(
                    f"The adapter gives the {name} as {shape}, the base has {wanted}.",
                    fix="Is this the base that the adapter was made for? A vocabulary may have been resized.",
                    module=path,
                    adapter=adapter.name,
                )


def _require_there(base: Checkpoint, tensors: Mapping[str, TensorChange]) -> None:
    """Every change is of a tensor that the base stores, or of a tied head: else it would be lost without a word."""
    lost = [name for name in tensors if name not in base and name not in (base.tied_head or ())]
    if lost:
        raise InternalError("A change of a tensor that is not there.", tensor=lost[0])


def _require_computable(base: Checkpoint, tensors: Mapping[str, TensorChange]) -> None:
    for name, change in tensors.items():
        if name in base and base[name].dtype not in COMPUTABLE and change.given is None:
            raise UnsupportedError(
                f"Weights in {base[name].dtype} are not merged into yet.",
                fix="Merge into the 16-bit checkpoint of this model.",
                tensor=name,
            )
