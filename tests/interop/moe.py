"""Tiny models with experts, adapters of their parameters by stock PEFT, and the exact sum as judge."""

import copy
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import models
from tests.interop import merging

EXPERTS, HIDDEN, INTERMEDIATE = 4, 32, 24
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": models.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def _mixtral(**changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**SIZES, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **changes}))


def _qwen2_moe(**changes):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {**SIZES, "intermediate_size": 40, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}
    sizes |= {"shared_expert_intermediate_size": 20, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**sizes, **changes}))


def _gpt_oss(**changes):
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {**SIZES, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**{**sizes, "head_dim": 8, **changes}))


BUILDERS = {"mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "gpt_oss": _gpt_oss}
FAMILIES = tuple(BUILDERS)
STORED_APART = {"mixtral": "block_sparse_moe.experts.0.w1.weight", "qwen2_moe": "mlp.experts.0.gate_proj.weight"}


def base(family, directory, dtype="fp32", **changes):
    """A random model on disk, as transformers saves it."""
    torch.manual_seed(0)
    model = models.disturbed(BUILDERS[family](**changes).to(models.DTYPES[dtype]).eval(), 0.02, seed=1)
    return models.save(model, Path(directory))


def write_by_peft(model, directory, *, seed=1, size=2e-2, **config):
    """Wrap the model, randomise every factor, save; the wrapped model too."""
    from peft import LoraConfig, get_peft_model

    with models.quiet():
        wrapped = get_peft_model(model, LoraConfig(**config))
        merging.randomise(wrapped, seed=seed, size=size)
        wrapped.save_pretrained(directory)
    return wrapped.eval()


def merged_on_disk(wrapped, directory):
    """PEFT's default merge, saved by transformers under the names that its files have; all tensors."""
    with models.quiet():
        copy.deepcopy(wrapped).merge_and_unload().save_pretrained(directory)
    return models.tensors_of(directory)


def exact(wrapped, parameter, before):
    """W + ΔW and |s| |B| |A| of one targeted parameter (experts, second, third) in float64, by the einsum formula."""
    module, _, name = parameter.rpartition(".")
    layer = dict(wrapped.named_modules())[f"base_model.model.{module}"]
    while layer.parameter_name != name:
        layer = layer.base_layer
    lora_A, lora_B = (side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
    count = before.shape[0]
    a, b = lora_A.reshape(count, -1, lora_A.shape[1]), lora_B.reshape(lora_B.shape[0], -1, count)
    transposed = getattr(layer.get_base_layer(), "is_transposed", False)
    formula = "o r e, e r i -> e i o" if transposed else "o r e, e r i -> e o i"
    scale = layer.scaling["default"]
    change = torch.einsum(formula, b, a) * scale
    return before.double() + change, torch.einsum(formula, b.abs(), a.abs()) * abs(scale)


def stored_pieces(family, parameter, fused):
    """The tensors that the family's files hold for one parameter of its class."""
    module, _, name = parameter.rpartition(".")
    if family not in STORED_APART:
        return {parameter: fused}
    half = fused.shape[1] // 2
    old = family == "mixtral"
    stored = module.replace(".mlp.", ".block_sparse_moe.") if old else module
    names = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for expert, matrix in enumerate(fused):
        if name == "down_proj":
            found[f"{stored}.{expert}.{names[2]}.weight"] = matrix
        else:
            found[f"{stored}.{expert}.{names[0]}.weight"] = matrix[:half]
            found[f"{stored}.{expert}.{names[1]}.weight"] = matrix[half:]
    return found


def assert_one_rounding(ours, family, wrapped, parameters):
    """Every stored piece of these parameters is round(W + ΔW)."""
    live = wrapped.get_base_model().state_dict()
    for parameter in parameters:
        module, _, name = parameter.rpartition(".")
        key = next(each for each in live if re.sub(r"\.base_layer", "", each) == f"{module}.{name}")
        want, size = exact(wrapped, parameter, live[key])
        sizes = stored_pieces(family, parameter, size)
        for tensor, judged in stored_pieces(family, parameter, want).items():
            slack = 2e-7 * sizes[tensor]
            off = (ours[tensor].double() - judged).abs()
            within = off <= 0.5 * models.ulp(ours[tensor], ours[tensor].dtype) + slack
            assert bool(within.all()), tensor


def other_era(adapter, directory, counts, version):
    """The adapter with its factors laid out as PEFT before 0.19.1 did: the two change sides, losslessly.

    `counts`: key prefix → number of experts.
    """
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    for prefix, count in counts.items():
        lora_A, lora_B = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
        a, b = lora_A.reshape(count, -1, lora_A.shape[1]), lora_B.reshape(lora_B.shape[0], -1, count)
        tensors[f"{prefix}.lora_A.weight"] = b.permute(2, 1, 0).reshape(-1, lora_B.shape[0]).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = a.permute(2, 1, 0).reshape(lora_A.shape[1], -1).contiguous()
    config = models.config_of(adapter)
    config.pop("peft_version")
    return models.write_adapter(directory, tensors, {**config, **({"peft_version": version} if version else {})})
