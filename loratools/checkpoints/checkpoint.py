"""A checkpoint: weights on disk, read no further than their headers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools.checkpoints import families
from loratools.checkpoints.modules import Module, modules_of
from loratools.tensors import TensorRef


@dataclasses.dataclass(frozen=True, slots=True)
class ShardInfo:
    """One weights file: its base name, its tensors in file order, its own metadata."""

    name: str
    tensors: tuple[str, ...]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, TensorRef]):
    """Tensor name → unread tensor, in file order.

    Attributes:
        tensors: the tensors.
        shards: the files that they lie in, in order.
        config: `config.json` as data; empty where there is none.
        name: a base name for reports; never a path.
        files: the weights files and the config, to be hashed and never written to.
        companions: every other file of the directory that belongs to the model (tokenizer, …).
        index_name: the base name of the shard index, if the checkpoint has one.
        report: its own `loratools.json`, if it has one.
        notes: what reading it had to say.
        location: where it was opened, so that a plan can open it again; never in a report.
    """

    tensors: Mapping[str, TensorRef]
    shards: tuple[ShardInfo, ...]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = "checkpoint"
    files: tuple[Path, ...] = ()
    companions: tuple[Path, ...] = ()
    index_name: str | None = None
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    location: str | None = None

    def __getitem__(self, name: str) -> TensorRef:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name!r}: {len(self)} tensors in {len(self.shards)} files>"

    @functools.cached_property
    def modules(self) -> Mapping[str, Module]:
        """The module tree's nodes that own tensors."""
        return modules_of({name: ref.spec for name, ref in self.tensors.items()}, self.config)

    @functools.cached_property
    def tied_head(self) -> tuple[str, str] | None:
        """(input embedding tensor, output head tensor) where the head is the embedding itself.

        Confirmed by the config, or inferred from a head that a model of this family must have and that
        the file does not store.
        """
        return families.tied_head(self.tensors, self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.tensors.values())
