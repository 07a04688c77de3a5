"""What a file tells of a convolution beside its kernel's shape: whether it is grouped or transposed.

Neither groups nor direction are stored. What can be told is told from shapes and biases; for the few families of
transformers whose grouped kernels look like plain ones, from the family (`groups=` in the modelling files of
transformers 5, https://github.com/huggingface/transformers). The rest is taken for plain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

from loratools.checkpoints.modules import Module

Form = Literal["plain", "one-channel", "grouped", "transposed"]

_GROUPED: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "data2vec-audio": re.compile(r"\bpos_conv_embed\.layers\.\d+\.conv$"),
        "mgp-str": re.compile(r"_a3_module\.(tokenLearner\.0|feat)$"),
        "regnet": re.compile(r"\.layer\.1\.convolution$"),
        "squeezebert": re.compile(r"\bencoder\.layers\.\d+\."),
    }
)
"""config `model_type` → paths of convolutions with more than one group and more than one channel in each."""

_TRANSPOSED: Final = re.compile(r"deconv|transpos|upscale_conv|upconv|conv_?tr?\d*([_.]|$)")
"""What `nn.ConvTransposeNd` is called, within the last two components of its path."""


def form_of(module: Module, config: Mapping[str, Any]) -> Form:
    """What sort of convolution a module of kind `conv` is.

    `one-channel`: every output sees one input channel, as in a depthwise convolution and in one over mono sound;
    `grouped`: several groups of several channels; `transposed`: the weight is (in, out / groups, k, …).
    """
    weight, bias = module.weight, module.parameters.get("bias")
    assert weight is not None
    rows, channels = weight.shape[:2]
    length = bias.shape[0] if bias is not None and len(bias.shape) == 1 else None
    if length not in {None, rows} or _TRANSPOSED.search(".".join(module.name.split(".")[-2:])):
        return "transposed"
    if channels == 1:
        return "one-channel"
    known = _GROUPED.get(str(config.get("model_type", "")))
    return "grouped" if known is not None and known.search(module.name) else "plain"
