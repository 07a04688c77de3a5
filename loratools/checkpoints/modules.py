"""The module tree of a checkpoint, from tensor names, shapes and the config alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from loratools.checkpoints import families
from loratools.tensors import COMPUTABLE, TensorSpec

Kind = Literal["linear", "conv1d", "embedding", "norm", "conv", "experts", "quantised", "other"]


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A node that owns tensors.

    Attributes:
        name: the module path.
        kind: `linear`, `conv1d` (HF Conv1D: weight stored (in, out)), `embedding`, `norm`, `conv`, `experts`
            (3-D, fused), `quantised` (a dtype that we do not compute with), `other`. A weight of three axes is a
            convolution's, (out, in, k), unless its path or its bias says experts.
        parameters: parameter name → spec; `weight`, `bias`, or whatever the model calls it.
        evidence: `confirmed` by shape or config, or `inferred` from the name.
    """

    name: str
    kind: Kind
    parameters: Mapping[str, TensorSpec]
    evidence: Literal["confirmed", "inferred"]

    @property
    def weight(self) -> TensorSpec | None:
        """The `weight` parameter, if there is one."""
        return self.parameters.get("weight")

    @property
    def stored_transposed(self) -> bool:
        """Whether the weight lies on disk as (in, out): HF Conv1D and embeddings."""
        return self.kind in {"conv1d", "embedding"}

    @property
    def numel(self) -> int:
        """Parameters that this module owns itself."""
        return sum(spec.numel for spec in self.parameters.values())


def owner(tensor: str) -> tuple[str, str]:
    """(module path, parameter name) of a tensor name; a bare name belongs to the root, ``""``."""
    module, _, parameter = tensor.rpartition(".")
    return module, parameter


def modules_of(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Mapping[str, Module]:
    """Group tensors into modules and tell what each is."""
    grouped: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        module, _, parameter = name.rpartition(".")
        grouped.setdefault(module, {})[parameter] = spec
    told: dict[object, tuple[Kind, Literal["confirmed", "inferred"]]] = {}  # layers repeat: each sort is looked at once
    found = {}
    for path, parameters in grouped.items():
        facts = [fact for name, spec in parameters.items() for fact in (name, spec.dtype, spec.shape)]
        sort = (path.rpartition(".")[2], _names_experts(path), *facts)
        if sort not in told:
            told[sort] = _kind(path, parameters, config)
        kind, evidence = told[sort]
        found[path] = Module(path, kind, MappingProxyType(parameters), evidence)
    return MappingProxyType(_with_siblings(found))


def _with_siblings(found: dict[str, Module]) -> dict[str, Module]:
    """Square matrices of a family that uses Conv1D, told by their siblings' biases where no config names the family."""
    names = families.CONV1D["gpt2"]
    if not any(module.kind == "conv1d" and families.last(path) in names for path, module in found.items()):
        return found
    return {
        path: dataclasses.replace(module, kind="conv1d")
        if module.kind == "linear" and module.evidence == "inferred" and families.last(path) in names
        else module
        for path, module in found.items()
    }


def _kind(
    path: str, parameters: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> tuple[Kind, Literal["confirmed", "inferred"]]:
    weight = parameters.get("weight")
    if weight is None:
        three = any(len(spec.shape) == 3 for spec in parameters.values())  # noqa: PLR2004  (experts × out × in)
        return ("experts", "inferred") if three and _names_experts(path) else ("other", "confirmed")
    if weight.dtype not in COMPUTABLE:
        return "quantised", "confirmed"
    if len(weight.shape) == 2:  # noqa: PLR2004
        return _matrix_kind(path, parameters, config)
    if len(weight.shape) == 1:
        return "norm", "inferred"
    return _kernel_kind(path, weight, parameters.get("bias")) if weight.shape else ("other", "confirmed")


def _kernel_kind(
    path: str, weight: TensorSpec, bias: TensorSpec | None
) -> tuple[Kind, Literal["confirmed", "inferred"]]:
    """A weight of three axes or more: a bias of one axis is a convolution's, of two axes that of stacked experts."""
    axes = len(bias.shape) if bias is not None else 0
    if len(weight.shape) == 3 and bias is not None and axes == 2 and bias.shape[0] == weight.shape[0]:  # noqa: PLR2004
        return "experts", "confirmed"
    if bias is not None and axes == 1 and bias.shape[0] == weight.shape[0]:
        return "conv", "confirmed"
    experts = len(weight.shape) == 3 and _names_experts(path)  # noqa: PLR2004
    return ("experts", "inferred") if experts else ("conv", "inferred")


def _names_experts(path: str) -> bool:
    """Whether what lies at `path` is experts' by name; a convolution of one expert is still a convolution."""
    last = families.last(path)
    return "conv" not in last and ("expert" in path or "moe" in path or last in families.EXPERT_STACKS)


def _matrix_kind(
    path: str, parameters: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> tuple[Kind, Literal["confirmed", "inferred"]]:
    rows, columns = parameters["weight"].shape
    bias = parameters.get("bias")
    conv1d_names = families.CONV1D.get(str(config.get("model_type", "")), frozenset())
    if families.last(path) in conv1d_names:
        return "conv1d", "confirmed"
    if bias is not None and len(bias.shape) == 1 and rows != columns:
        if bias.shape[0] == columns:
            return "conv1d", "confirmed"
        if bias.shape[0] == rows:
            return "linear", "confirmed"
    if bias is None and families.last(path) in families.EMBEDDINGS:
        return "embedding", "inferred"
    return "linear", "inferred"
