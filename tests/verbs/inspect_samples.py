"""Tiny models of transformers and adapters of PEFT, saved by their own libraries."""

import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SMALL, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}


def _causal(kind, **options):
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options))


MODELS = {
    "llama": lambda: _causal("llama", **LLAMA, tie_word_embeddings=False),
    "qwen2-tied": lambda: _causal("qwen2", **LLAMA, tie_word_embeddings=True),
    "gemma2": lambda: _causal("gemma2", **LLAMA, head_dim=8),
    "gpt2": lambda: _causal("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16),
    "gpt-neox": lambda: _causal("gpt_neox", **SMALL, vocab_size=64),
    "opt": lambda: _causal(
        "opt",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        word_embed_proj_dim=32,
    ),
    "mamba": lambda: _causal("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, vocab_size=64)),
    "bert-base": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=64)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    ),
    "mixtral": lambda: _causal("mixtral", **LLAMA, num_local_experts=4),
    "resnet": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}


@functools.cache
def model_named(name):
    """The model, built once."""
    torch.manual_seed(0)
    return MODELS[name]()


def parameters_of(model):
    """What torch counts: a shared parameter once, no buffer."""
    return sum(parameter.numel() for parameter in model.parameters())
