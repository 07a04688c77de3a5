"""What names and configuration say about a family of models. Facts as data; no model code is imported.

Source: the modelling files of transformers 5 (https://github.com/huggingface/transformers), read for
`base_model_prefix`, for uses of `Conv1D`, and for the names of `nn.Embedding` attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

BASE_PREFIX: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "llama",
                "mistral",
                "mixtral",
                "qwen2",
                "qwen2_moe",
                "qwen3",
                "qwen3_moe",
                "gemma",
                "gemma2",
                "phi",
                "phi3",
                "olmo",
                "olmo2",
                "stablelm",
                "cohere",
                "starcoder2",
                "granite",
                "deepseek_v2",
                "deepseek_v3",
                "opt",
                "bart",
                "modernbert",
                "whisper",
                "glm",
                "glm4",
                "smollm3",
                "nemotron",
            ),
            "model",
        ),
        **dict.fromkeys(
            (
                "gpt2",
                "gpt_neo",
                "gptj",
                "bloom",
                "falcon",
                "mpt",
                "codegen",
                "ctrl",
                "openai-gpt",
                "xlnet",
                "gpt_bigcode",
            ),
            "transformer",
        ),
        **{
            name: name
            for name in ("bert", "roberta", "distilbert", "electra", "albert", "mpnet", "gpt_neox", "vit", "biogpt")
        },
        "xlm-roberta": "roberta",
        "deberta-v2": "deberta",
        "mamba": "backbone",
    }
)
"""config `model_type` → the attribute that a model with a head keeps its base model under."""

CONV1D: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        family: frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
        for family in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
    }
)
"""config `model_type` → last name components of modules that are HF `Conv1D`: weight stored (in, out)."""

EMBEDDINGS: Final = frozenset(
    {
        "embed_tokens",
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
        "position_embedding",
        "shared",
        "token_embedding",
        "wte",
        "wpe",
        "tok_embeddings",
        "embed_in",
        "embed_positions",
        "tokens_embed",
        "positions_embed",
        "relative_attention_bias",
        "row_embeddings",
        "column_embeddings",
        "embeddings",
        "word_embedding",
        "embedding",
        "entity_embeddings",
        "embed_out_tokens",
        "x_position_embeddings",
        "y_position_embeddings",
    }
)
"""Last name components of `nn.Embedding` modules."""

EXPERT_STACKS: Final = frozenset({"input_linear", "output_linear"})
"""Last name components of modules whose three-axis `weight` stacks experts' matrices without `expert` in the path."""

INPUT_EMBEDDINGS: Final = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "shared",
    "tok_embeddings",
    "embed_in",
    "tokens_embed",
    "embeddings",
)
"""Last components of the token embedding, most telling first."""

HEADS: Final = (
    "lm_head", "embed_out", "output", "cls.predictions.decoder", "vocab_projector", "lm_head.decoder",
    "generator_lm_head", "predictions.decoder",
)  # fmt: skip
"""Module paths (suffixes) of the projection onto the vocabulary."""

MASKED_HEAD: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bert": "cls.predictions.decoder",
        "roberta": "lm_head.decoder",
        "xlm-roberta": "lm_head.decoder",
        "mpnet": "lm_head.decoder",
        "distilbert": "vocab_projector",
        "electra": "generator_lm_head",
        "albert": "predictions.decoder",
    }
)
"""config `model_type` → the head of its masked language model, which checkpoints leave out where it is tied."""

TIED_BY_DEFAULT: Final = frozenset(
    {
        "gpt2",
        "gpt_neo",
        "opt",
        "bloom",
        "bert",
        "roberta",
        "distilbert",
        "gemma",
        "gemma2",
        "t5",
        "bart",
        "mpt",
        "falcon",
    }
)
"""Families whose config ties input and output embeddings when it does not mention it."""


def last(path: str) -> str:
    """The last component of a dotted path."""
    return path.rpartition(".")[2]


def input_embedding(names: Collection[str]) -> str | None:
    """The tensor name of the token embedding, if one can be told."""
    owners = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    for wanted in INPUT_EMBEDDINGS:
        found = [path for path in owners if last(path) == wanted]
        if len(found) == 1:
            return f"{found[0]}.weight"
    return None


def head(names: Collection[str]) -> str | None:
    """The tensor name of a stored output head, if there is one; what lies in a numbered layer is none."""
    for wanted in HEADS:
        for name in names:
            if any(piece.isdigit() for piece in name.split(".")):
                continue
            if name == f"{wanted}.weight" or name.endswith(f".{wanted}.weight"):
                return name
    return None


def tied_head(names: Collection[str], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(embedding tensor, head tensor) if the config says, or the family implies, that they are one matrix."""
    family = str(config.get("model_type", ""))
    tied = config.get("tie_word_embeddings", family in TIED_BY_DEFAULT)
    embedding = input_embedding(names) if tied is True else None
    if embedding is None:
        return None
    architectures = config.get("architectures") or []
    generative = any(
        isinstance(name, str) and name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM"))
        for name in architectures
    )
    stored = head(names)
    if stored is None and not generative:
        return None
    return embedding, stored or f"{MASKED_HEAD.get(family, 'lm_head')}.weight"


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type, only where it adds nothing of its own to what is loaded."""
    names = config.get("architectures") or []
    causal = any(isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return "CAUSAL_LM" if causal else None
