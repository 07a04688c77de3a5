"""What every dialect's codec is made of: tensors by key to updates by module, and back. It opens no file."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from loratools.adapters import AbstractUpdate, Adapter
from loratools.tensors import TensorRef


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """What the files of an adapter hold, before anybody has made sense of it.

    Attributes:
        tensors: key → unread tensor.
        config: the configuration beside them as data, or None.
        metadata: the weights file's own metadata.
        side_tensors: tensors of side files, by file name.
        shapes: of the base's parameters by name, as a model class has them; empty where no base is known.
    """

    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    side_tensors: Mapping[str, Mapping[str, TensorRef]] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Decoded:
    """What a codec understood: updates by module path, and what it has to say about them."""

    updates: Mapping[str, AbstractUpdate]
    base_model: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """What goes into the files of an adapter.

    Attributes:
        weights_name: base name of the weights file.
        tensors: key → tensor, in the order in which they are written.
        metadata: for the weights file.
        texts: other files, base name → content.
        side_tensors: further weights files, base name → key → tensor.
        notes: what the format could say only in its own way.
    """

    weights_name: str
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    texts: Mapping[str, str]
    side_tensors: Mapping[str, Mapping[str, TensorRef]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class AbstractCodec(abc.ABC):
    """One dialect. Law: `decode(encode(x)) = x` for every adapter `x` of which `cannot_hold(x)` is empty."""

    name: str
    spec_url: str

    @abc.abstractmethod
    def fingerprint(self, contents: Contents) -> str | None:
        """Why these contents are of this dialect, or None."""

    @abc.abstractmethod
    def decode(self, contents: Contents) -> Decoded:
        """Updates by module path.

        Raises:
            MalformedError, MismatchError: keys or shapes contradict each other.
            UnsupportedError: a kind that we do not handle, by its name.
        """

    @abc.abstractmethod
    def encode(self, adapter: Adapter, *, siblings: Collection[str] = ()) -> Encoded:
        """Keys and configuration for `adapter`; every update must be settled (one term at most).

        Args:
            adapter: what to write.
            siblings: all module paths of the model it is for, where known: some dialects name
                modules by suffix, and must not catch a neighbour.

        Raises:
            UnsupportedError: the dialect cannot hold it; the message lists what would be lost.
        """

    @abc.abstractmethod
    def cannot_hold(self, adapter: Adapter) -> list[str]:
        """What of `adapter` this dialect cannot express, a sentence each; empty if nothing."""
