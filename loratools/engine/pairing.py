"""Which tensor of the tuned checkpoint is which of the base, and what a model class will call the module."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal

from loratools.checkpoints import Checkpoint, Module, families, owner
from loratools.engine.binding import Renaming, reconcile
from loratools.errors import MismatchError
from loratools.tensors import COMPUTABLE, TensorRef

_LISTED = 5
_MATRIX = 2
Relation = Literal["same", "rows", "reshaped", "new-module", "new-parameter"]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the tuned checkpoint with its counterpart.

    Attributes:
        relation: `same` shape; `rows` appended; `reshaped` (a head of another size); `new-module`;
            `new-parameter` of a module that the base has.
    """

    tuned_name: str
    tuned: TensorRef
    base_name: str | None
    base: TensorRef | None
    relation: Relation

    @property
    def nbytes(self) -> int:
        """Bytes on both sides."""
        return self.tuned.nbytes + (self.base.nbytes if self.base is not None else 0)

    @property
    def is_packed(self) -> bool:
        """Whether the base holds a matrix in a form that is not computed with, and the tuned checkpoint does not."""
        packed = self.base is not None and self.base.dtype not in COMPUTABLE and self.tuned.dtype in COMPUTABLE
        return packed and len(self.tuned.shape) > 1


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Two checkpoints of one architecture, module by module.

    Attributes:
        modules: adapter module path → parameter → pair, in the tuned checkpoint's order.
        only_in_base: tensors of the base that the tuned one does not have.
        prefix: what was put before the tuned names to get the module paths of the model class.
        notes: what was reconciled.
    """

    base: Checkpoint
    tuned: Checkpoint
    modules: Mapping[str, Mapping[str, Pair]]
    only_in_base: tuple[str, ...]
    prefix: str
    notes: tuple[str, ...]
    kinds: Mapping[str, Module]
    tied: str | None

    @classmethod
    def of(cls, base: Checkpoint, tuned: Checkpoint) -> Pairing:
        """Pair by name, reconciling a prefix.

        Raises:
            MismatchError: nothing corresponds, or shapes differ where no head or vocabulary explains it.
        """
        renaming = reconcile(list(tuned), list(base))
        notes = [f"Names of the tuned checkpoint are read {renaming}: the base names them so."] if renaming else []
        effective, tied = _effective_tuned(base, tuned, notes)
        owners = {owner(name)[0] for name in base}
        pairs = {name: _pair(name, ref, base, renaming, owners) for name, ref in effective.items()}
        _require_same_architecture(base, tuned, pairs)
        prefix = class_prefix(tuned)
        if prefix:
            notes.append(f"Module paths get the prefix {prefix!r}, which the model class has and the file does not.")
        modules: dict[str, dict[str, Pair]] = {}
        for name, pair in pairs.items():
            module, parameter = owner(name)
            modules.setdefault(_class_path(module, prefix), {})[parameter] = pair
        used = {pair.base_name for pair in pairs.values()}
        only = tuple(name for name in base if name not in used and not _is_tied_copy(base, name, tied))
        kinds = {_class_path(name, prefix): module for name, module in tuned.modules.items()}
        tied_path = _class_path(owner(tied)[0], prefix) if tied else None
        return cls(base, tuned, modules, only, prefix, tuple(notes), kinds, tied_path)

    def tuned_module(self, path: str) -> Module:
        """The module of the tuned checkpoint behind an adapter path; a head that is the embedding is a Linear."""
        found = self.kinds.get(path)
        if found is not None:
            return found
        weight = self.modules[path]["weight"].tuned.spec
        return Module(path, "linear", {"weight": weight}, "inferred")

    def is_tied_embedding(self, path: str) -> bool:
        """Whether the module is an embedding that is the output head too, on both sides."""
        return self.tied is not None and path == self.tied


def _effective_tuned(base: Checkpoint, tuned: Checkpoint, notes: list[str]) -> tuple[dict[str, TensorRef], str | None]:
    """The tuned tensors with tied matrices once, and the name of the matrix that is tied on both sides."""
    tensors = dict(tuned)
    head = tuned.tied_head
    for side, checkpoint in (("base", base), ("tuned checkpoint", tuned)):
        if not checkpoint.config:
            notes.append(f"The {side} has no config.json: kinds of modules and ties were told from names and shapes.")
    if head is None:
        if base.tied_head is not None and base.tied_head[1] in tuned:
            notes.append(
                f"The tuned checkpoint unties {base.tied_head[1]} from the embedding. `loratools merge` keeps them "
                "apart; PEFT's own merge on the tied base changes both."
            )
        return tensors, None
    embedding, output = head
    if base.tied_head is not None:
        if tensors.pop(output, None) is not None:
            notes.append(f"{output} is tied to {embedding} and is looked at once.")
        return tensors, embedding
    if families.head(base) is not None:
        tensors[output] = tuned[embedding]
        notes.append(f"The tuned checkpoint ties {output} to {embedding}; the base does not: both are compared.")
    return tensors, None


def _is_tied_copy(base: Checkpoint, name: str, tied: str | None) -> bool:
    return tied is not None and base.tied_head is not None and name == base.tied_head[1]


def _pair(name: str, ref: TensorRef, base: Checkpoint, renaming: Renaming, owners: Collection[str]) -> Pair:
    base_name = name if name in base else renaming.apply(name)
    found = base.get(base_name)
    if found is None and base.tied_head is not None and base_name == base.tied_head[1]:
        base_name = base.tied_head[0]
        found = base[base_name]
    if found is None:
        known = owner(base_name)[0] in owners
        return Pair(name, ref, None, None, "new-parameter" if known else "new-module")
    return Pair(name, ref, base_name, found, _relation(ref, found, base))


def _relation(tuned: TensorRef, base: TensorRef, checkpoint: Checkpoint) -> Relation:
    if tuned.shape == base.shape:
        return "same"
    if len(tuned.shape) != len(base.shape) or not tuned.shape or tuned.shape[1:] != base.shape[1:]:
        return "reshaped"
    if len(tuned.shape) > _MATRIX:  # a kernel is no vocabulary
        return "reshaped"
    embedding = families.input_embedding(checkpoint)
    vocabulary = checkpoint[embedding].shape[0] if embedding is not None else None
    grown = tuned.shape[0] > base.shape[0]
    return "rows" if grown and base.shape[0] in {vocabulary, checkpoint.config.get("vocab_size")} else "reshaped"


def _require_same_architecture(base: Checkpoint, tuned: Checkpoint, pairs: Mapping[str, Pair]) -> None:
    same = sum(pair.relation in {"same", "rows"} for pair in pairs.values())
    odd = [
        pair
        for pair in pairs.values()
        if (pair.relation == "reshaped" and not _is_head(pair)) or (pair.relation == "new-module" and _numbered(pair))
    ]
    if odd or 2 * same < len(pairs):
        listed = ", ".join(
            f"{pair.tuned_name} {pair.base.shape if pair.base else None} → {pair.tuned.shape}" for pair in odd[:_LISTED]
        )
        raise MismatchError(
            f"The checkpoints are not of one architecture: {same} of {len(pairs)} tensors correspond, and {len(odd)} "
            "have another shape or stand in layers that the base does not have.",
            fix="Name the base that the tuned checkpoint started from.",
            base=base.name,
            tuned=tuned.name,
            **({"differing": listed + (", …" if len(odd) > _LISTED else "")} if odd else {}),
        )


def _numbered(pair: Pair) -> bool:
    """Whether the tensor stands in a numbered layer, which no adapter can add."""
    return any(piece.isdigit() for piece in pair.tuned_name.split("."))


def _is_head(pair: Pair) -> bool:
    """A head stands outside of the numbered layers and keeps its input width; an embedding is none, grown or shrunk."""
    numbered = _numbered(pair)
    embedding = families.last(owner(pair.tuned_name)[0]) in families.EMBEDDINGS
    base = pair.base
    return not numbered and not embedding and base is not None and base.shape[1:] == pair.tuned.shape[1:]


def class_prefix(checkpoint: Checkpoint) -> str:
    """The prefix that the model class of `config.architectures` puts before names that the file has without it."""
    family = str(checkpoint.config.get("model_type", ""))
    attribute = families.BASE_PREFIX.get(family)
    names = checkpoint.config.get("architectures") or []
    if attribute is None or not names or not isinstance(names[0], str):
        return ""
    if names[0].endswith("Model") and not names[0].endswith(("LMHeadModel", "HeadsModel")):
        return ""
    return "" if any(name.startswith(f"{attribute}.") for name in checkpoint) else f"{attribute}."


def _class_path(module: str, prefix: str) -> str:
    """The model class's path of a module; heads are not below the base model."""
    if not prefix or any(module == head or module.startswith(f"{head}.") for head in (*families.HEADS, *_HEADS)):
        return module
    return prefix + module if module else prefix.removesuffix(".")


_HEADS = ("classifier", "score", "qa_outputs", "cls")
