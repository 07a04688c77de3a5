"""Families of experts with dense layers beside them, biases, or routers that are no Linear."""

import torch

from tests import models
from tests.interop import moe

TOKENS = moe.SIZES


def _deepseek_v3(**changes):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {**TOKENS, "num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": 24,
             "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1,
             "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4,
             "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**sizes, **changes}))


def _qwen3_moe(**changes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {**TOKENS, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8,
             "num_experts_per_tok": 2, "mlp_only_layers": [0]}  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes}))


def _ernie(**changes):
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    sizes = {**TOKENS, "intermediate_size": 40, "moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2,
             "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "use_bias": True}  # fmt: skip
    return Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**sizes, **changes}))


BUILDERS = {**moe.BUILDERS, "deepseek_v3": _deepseek_v3, "qwen3_moe": _qwen3_moe, "ernie4_5_moe": _ernie}


def pair(family, directory, only=lambda name: True, **changes):
    """A base and a fine-tune of it on disk, and the fine-tune in memory."""
    torch.manual_seed(0)
    model = models.disturbed(BUILDERS[family](**changes).float().eval(), 0.02, seed=1)
    base = models.save(model, directory / "base")
    tuned = models.disturbed(models.load(base), 0.05, only=only)
    return base, models.save(tuned, directory / "tuned"), tuned


def said(adapter):
    """PEFT's warning that patterns for parameters match no module, where there are patterns for such."""
    config = models.config_of(adapter)
    return tuple(f"{name} keys did not" for name in ("rank_pattern", "alpha_pattern")
                 if any("weight" in key or "experts" in key for key in config[name]))  # fmt: skip
