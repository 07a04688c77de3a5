"""What a checkpoint is, told from names, shapes and configuration: its family, and what counts as a parameter.

Source of the buffer names: `register_buffer` and `nn.Buffer` in the modelling files of transformers 5
(https://github.com/huggingface/transformers), and the causal masks that files of GPT-2 from 2019 hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Final, Literal, NamedTuple

from loratools.checkpoints.checkpoint import Checkpoint
from loratools.checkpoints.modules import Module, owner
from loratools.tensors import TensorSpec

BUFFERS: Final = frozenset(
    {
        "e_score_correction_bias",
        "final_logits_bias",
        "inv_freq",
        "layer_scalar",
        "masked_bias",
        "num_batches_tracked",
        "position_ids",
        "relative_position_index",
        "running_mean",
        "running_var",
        "token_type_ids",
    }
)
"""Names of tensors that files store and training does not touch."""

_MASK_AXES: Final = 4
_NOT_TRAINED: Final = frozenset({"BOOL", "I64"})
_SIGNS: Final = (
    ("BERT-like", (".attention.self.query.weight", ".intermediate.dense.weight")),
    ("GPT-2-like", (".attn.c_attn.weight", ".mlp.c_fc.weight")),
    ("GPT-NeoX-like", (".attention.query_key_value.weight", ".mlp.dense_h_to_4h.weight")),
    ("Llama-like", (".self_attn.q_proj.weight", ".post_attention_layernorm.weight")),
    ("T5-like", (".SelfAttention.q.weight", ".DenseReluDense.wo.weight")),
)
"""Family → endings of tensor names that it has, all of them; inferred, so that no model class is claimed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """Which model this is.

    Attributes:
        model_type: the config's, or a description by layout where there is none.
        architectures: the config's model classes.
        evidence: `confirmed` by the config, `inferred` from tensor names, or `unknown`.
    """

    model_type: str | None
    architectures: tuple[str, ...]
    evidence: Literal["confirmed", "inferred", "unknown"]


@dataclasses.dataclass(frozen=True, slots=True)
class Tie:
    """Two names for one matrix.

    Attributes:
        tensor: the output head.
        same_as: the input embedding.
        stored: whether the file holds the head too; whether its bytes agree has not been looked at.
        evidence: `confirmed` by the config, or `inferred` from what the family does by default.
    """

    tensor: str
    same_as: str
    stored: bool
    evidence: Literal["confirmed", "inferred"]


class ModuleRow(NamedTuple):
    """One module of a checkpoint: the shape and dtype of its weight as stored, its own parameters counted once."""

    name: str
    kind: str
    shape: tuple[int, ...] | None
    dtype: str
    parameters: int
    evidence: str

    def to_json(self) -> dict[str, Any]:
        """The row as JSON."""
        shape = list(self.shape) if self.shape is not None else None
        row = {"name": self.name, "kind": self.kind, "shape": shape, "dtype": self.dtype}
        return {**row, "parameters": self.parameters, "evidence": self.evidence}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family, and how it is known."""
    kind = checkpoint.config.get("model_type")
    named = checkpoint.config.get("architectures")
    classes = tuple(each for each in named if isinstance(each, str)) if isinstance(named, list) else ()
    if isinstance(kind, str) or classes:
        return Family(kind if isinstance(kind, str) else None, classes, "confirmed")
    for family, endings in _SIGNS:
        if all(any(name.endswith(ending) for name in checkpoint) for ending in endings):
            return Family(family, (), "inferred")
    return Family(None, (), "unknown")


def tie_of(checkpoint: Checkpoint, chosen: Collection[str]) -> Tie | None:
    """The output head that is the input embedding, if the embedding is among the `chosen` module paths.

    A stored head of another shape is not the embedding, whatever the config says.
    """
    found = checkpoint.tied_head
    if found is None or owner(found[0])[0] not in chosen:
        return None
    embedding, output = found
    stored = output in checkpoint
    if stored and checkpoint[output].shape != checkpoint[embedding].shape:
        return None
    said = checkpoint.config.get("tie_word_embeddings") is True
    return Tie(output, embedding, stored, "confirmed" if said else "inferred")


def is_buffer(parameter: str, spec: TensorSpec) -> bool:
    """Whether a stored tensor is a buffer: part of the file, not of what `model.parameters()` counts."""
    mask = parameter == "bias" and len(spec.shape) == _MASK_AXES
    return parameter in BUFFERS or mask or spec.dtype in _NOT_TRAINED


def counts(parameter: str, spec: TensorSpec, tie: Tie | None = None) -> bool:
    """Whether a stored tensor is a parameter that no other module has: no buffer, no head that is the embedding."""
    return not is_buffer(parameter, spec) and (tie is None or spec.name != tie.tensor)


def counted(module: Module, tie: Tie | None = None) -> int:
    """The number of parameters of a module, without what does not count."""
    return sum(spec.numel for parameter, spec in module.parameters.items() if counts(parameter, spec, tie))


def face(module: Module) -> tuple[tuple[int, ...] | None, str]:
    """Shape and dtype that stand for a module: those of its weight, or of the only tensor that it has.

    No shape, and all of its dtypes joined, where it has several tensors and no weight.
    """
    parameters = module.parameters
    spec = parameters.get("weight")
    if spec is None and len(parameters) == 1:
        spec = next(iter(parameters.values()))
    if spec is not None:
        return spec.shape, spec.dtype
    return None, "+".join(sorted({each.dtype for each in parameters.values()}))
