"""What llama.cpp calls a matrix → what model classes of transformers call the module. Facts as data.

Source: `gguf-py/gguf/tensor_mapping.py` of https://github.com/ggml-org/llama.cpp. A name is `blk.N.<short>.weight`, or
that of a matrix outside the layers. Some conversions permute the rows of q and k for another rotary layout; the
columns, which are the inputs, lie as in the model class for all that is named here.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Final

_BLOCK: Final = re.compile(r"blk\.(?P<layer>\d{1,6})\.(?P<short>\w+)\.weight", re.ASCII)

LAYERS: Final = (
    "model.layers.{}", "layers.{}", "model.language_model.layers.{}", "language_model.model.layers.{}",
    "language_model.layers.{}", "transformer.h.{}", "h.{}", "gpt_neox.layers.{}", "bert.encoder.layer.{}",
    "encoder.layer.{}", "roberta.encoder.layer.{}",
)  # fmt: skip
"""Where model classes keep their layers; a model has one of these."""

IN_LAYER: Final = MappingProxyType(
    {
        "attn_q": ("self_attn.q_proj", "attention.self.query"),
        "attn_k": ("self_attn.k_proj", "attention.self.key"),
        "attn_v": ("self_attn.v_proj", "attention.self.value"),
        "attn_qkv": (
            "self_attn.qkv_proj", "attn.c_attn", "attention.query_key_value", "self_attention.query_key_value",
        ),
        "attn_output": (
            "self_attn.o_proj", "self_attn.dense", "self_attn.out_proj", "attn.c_proj", "attention.dense",
            "self_attention.dense", "attention.output.dense",
        ),
        "ffn_gate": ("mlp.gate_proj", "feed_forward.gate_proj"),
        "ffn_up": (
            "mlp.up_proj", "mlp.gate_up_proj", "mlp.c_fc", "mlp.fc1", "mlp.dense_h_to_4h", "intermediate.dense",
            "feed_forward.up_proj",
        ),
        "ffn_down": (
            "mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.dense_4h_to_h", "output.dense", "feed_forward.down_proj",
        ),
        "ffn_gate_shexp": ("mlp.shared_expert.gate_proj", "mlp.shared_experts.gate_proj"),
        "ffn_up_shexp": ("mlp.shared_expert.up_proj", "mlp.shared_experts.up_proj"),
        "ffn_down_shexp": ("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj"),
        "ffn_gate_inp": ("mlp.gate", "mlp.router", "block_sparse_moe.gate", "feed_forward.router"),
        "ffn_gate_inp_shexp": ("mlp.shared_expert_gate",),
        "attn_q_a": ("self_attn.q_a_proj",),
        "attn_q_b": ("self_attn.q_b_proj",),
        "attn_kv_a_mqa": ("self_attn.kv_a_proj_with_mqa",),
        "attn_kv_b": ("self_attn.kv_b_proj",),
    }
)  # fmt: skip
"""Short name → module paths below a layer: llama, mistral, qwen, gemma, phi-3, deepseek; GPT-2, NeoX, falcon; BERT."""

OUTSIDE: Final = MappingProxyType({"output.weight": ("lm_head", "embed_out", "language_model.lm_head")})
"""Recorded only if `llama-imatrix` was asked to process the output; never of a head that is tied to the embedding."""

_EXPERT_BLOCKS: Final = ("mlp.experts", "feed_forward.experts", "block_sparse_moe.experts")
EXPERTS: Final = MappingProxyType(
    {
        "ffn_gate_exps": "gate_up_proj",
        "ffn_up_exps": "gate_up_proj",
        "ffn_gate_up_exps": "gate_up_proj",
        "ffn_down_exps": "down_proj",
    }
)
"""Tensors that stack all experts of a layer → the stacked parameter of transformers 5; gate and up have one input."""


def module_paths(name: str) -> list[str]:
    """The module paths that llama.cpp's tensor `name` may stand for, most likely first; none where it is not known.

    Of stacked experts, the paths of the parameter: `model.layers.0.mlp.experts.down_proj`.
    """
    found = _BLOCK.fullmatch(name)
    if found is None:
        return list(OUTSIDE.get(name, ()))
    inside = list(IN_LAYER.get(found["short"], ()))
    if found["short"] in EXPERTS:
        inside = [f"{block}.{EXPERTS[found['short']]}" for block in _EXPERT_BLOCKS]
    return [f"{layer.format(int(found['layer']))}.{module}" for module in inside for layer in LAYERS]
