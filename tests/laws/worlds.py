"""Small checkpoints and adapters of every kind, written by hand: laws need no model class."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import models

P = "base_model.model."
DTYPES = ("bf16", "fp16", "fp32")
SIZES = {"vocabulary": 40, "width": 24, "inner": 32}

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "tie_word_embeddings": False}
TIED = {**LLAMA, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 40, "tie_word_embeddings": False}


@dataclasses.dataclass(frozen=True)
class World:
    """A base with adapters of one kind.

    Attributes:
        base: the checkpoint.
        adapters: the adapters.
        touched: tensors of the base that they change.
    """

    base: Path
    adapters: list[Path]
    touched: set[str]


def noise(shape, seed, size=0.3):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llama_tensors(dtype, *, tied=False, seed=0):
    """Two blocks' worth of tensors, integers and a scalar among them."""
    vocabulary, width, inner = SIZES.values()
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {f"{layer}self_attn.q_proj.weight": (width, width), f"{layer}self_attn.q_proj.bias": (width,)}
        shapes |= {f"{layer}self_attn.k_proj.weight": (width // 2, width), f"{layer}input_layernorm.weight": (width,)}
        shapes |= {f"{layer}mlp.up_proj.weight": (inner, width), f"{layer}mlp.down_proj.weight": (width, inner)}
    shapes |= {"model.norm.weight": (width,)} | ({} if tied else {"lm_head.weight": (vocabulary, width)})
    tensors = {
        name: noise(shape, seed * 100 + i).to(models.DTYPES[dtype]) for i, (name, shape) in enumerate(shapes.items())
    }
    return tensors | {"model.position_ids": torch.arange(7), "model.steps": torch.tensor(3)}


def gpt2_tensors(dtype, seed=0):
    """HF Conv1D: weights lie (in, out), a square one among them."""
    vocabulary, width, inner = SIZES.values()
    shapes = {"transformer.wte.weight": (vocabulary, width)}
    for layer in ("transformer.h.0.", "transformer.h.1."):
        for name, (rows, columns) in {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
                                      "mlp.c_fc": (width, inner)}.items():  # fmt: skip
            shapes |= {f"{layer}{name}.weight": (rows, columns), f"{layer}{name}.bias": (columns,)}
    shapes |= {"lm_head.weight": (vocabulary, width)}
    return {
        name: noise(shape, seed * 100 + i).to(models.DTYPES[dtype]) for i, (name, shape) in enumerate(shapes.items())
    }


def write_base(directory, tensors, config, *, sharded=False):
    """One file, or three with an index; a tokenizer beside it."""
    directory = Path(directory)
    directory.mkdir(parents=True)
    names = list(tensors)
    count = 3 if sharded else 1
    pieces = [names[index * len(names) // count : (index + 1) * len(names) // count] for index in range(count)]
    files = ["model.safetensors"] if not sharded else [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for file, piece in zip(files, pieces, strict=True):
        save_file({name: tensors[name] for name in piece}, directory / file, metadata={"format": "pt"})
    if sharded:
        index = {
            "metadata": {},
            "weight_map": {name: file for file, piece in zip(files, pieces, strict=True) for name in piece},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def low_rank(path, shape, rank, seed, dtype="fp32", *, embedding=False, size=0.05):
    """Keys and factors of one module; shape is (out, in)."""
    stem = "lora_embedding_" if embedding else "lora_"
    end = "" if embedding else ".weight"
    factors = {f"{P}{path}.{stem}A{end}": noise((rank, shape[1]), seed, size**0.5),
               f"{P}{path}.{stem}B{end}": noise((shape[0], rank), seed + 1, size**0.5)}  # fmt: skip
    return {key: tensor.to(models.DTYPES[dtype]) for key, tensor in factors.items()}


def _linear(root, index):
    width, inner = SIZES["width"], SIZES["inner"]
    tensors = low_rank("model.layers.0.self_attn.q_proj", (width, width), 3 + index, index * 10, "fp32")
    tensors |= low_rank("model.layers.1.mlp.down_proj", (width, inner), 2, index * 10 + 2, "bf16")
    config = {"r": 3 + index, "lora_alpha": 5 + index, "target_modules": ["q_proj", "down_proj"],
              "rank_pattern": {"down_proj": 2}, "use_rslora": bool(index % 2)}  # fmt: skip
    touched = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    return models.write_adapter(root / f"linear{index}", tensors, config), touched


def _conv1d(root, index):
    width, inner = SIZES["width"], SIZES["inner"]
    shapes = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width), "mlp.c_fc": (inner, width)}
    tensors, touched = {}, set()
    for i, (name, shape) in enumerate(shapes.items()):
        tensors |= low_rank(f"transformer.h.1.{name}", shape, 2 + index, index * 10 + 2 * i)
        touched.add(f"transformer.h.1.{name}.weight")
    config = {"r": 2 + index, "lora_alpha": 3, "target_modules": list(shapes), "fan_in_fan_out": True}
    return models.write_adapter(root / f"conv{index}", tensors, config), touched


def _embedding(root, index):
    vocabulary, width = SIZES["vocabulary"], SIZES["width"]
    tensors = low_rank("model.embed_tokens", (width, vocabulary), 2, index * 10, embedding=True)
    tensors |= low_rank("lm_head", (vocabulary, width), 2, index * 10 + 2)
    config = {"r": 2, "lora_alpha": 7 - index, "target_modules": ["embed_tokens", "lm_head"]}
    return models.write_adapter(root / f"embedding{index}", tensors, config), {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def _whole(root, index):
    width = SIZES["width"]
    tensors = low_rank("model.layers.0.self_attn.q_proj", (width, width), 2, index * 10)
    tensors |= {f"{P}model.layers.0.self_attn.q_proj.base_layer.bias": noise((width,), index * 10 + 4)}
    tensors |= {f"{P}model.norm.weight": noise((width,), index * 10 + 5)}
    tensors |= {f"{P}model.layers.1.self_attn.q_proj.bias": noise((width,), index * 10 + 6)}
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"], "bias": "all",
              "modules_to_save": ["model.norm"]}  # fmt: skip
    touched = {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight",
               "model.layers.1.self_attn.q_proj.bias"}  # fmt: skip
    return models.write_adapter(root / f"whole{index}", tensors, config), touched


def _tied(root, index):
    vocabulary, width = SIZES["vocabulary"], SIZES["width"]
    tensors = low_rank("model.embed_tokens", (width, vocabulary), 2, index * 10, embedding=True)
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens"]}
    return models.write_adapter(root / f"tied{index}", tensors, config), {"model.embed_tokens.weight"}


def _tied_as_one(root, index):
    vocabulary, width = SIZES["vocabulary"], SIZES["width"]
    one = low_rank("model.embed_tokens", (width, vocabulary), 2, index * 10, embedding=True)
    down, up = one.values()
    both = one | {f"{P}lm_head.lora_A.weight": up.T, f"{P}lm_head.lora_B.weight": down.T}
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["model.embed_tokens", "lm_head"], "ensure_weight_tying": True}
    return models.write_adapter(root / f"one{index}", both, config), {"model.embed_tokens.weight"}


KINDS = {
    "linear": (_linear, LLAMA),
    "conv1d": (_conv1d, GPT2),
    "embedding": (_embedding, LLAMA),
    "whole": (_whole, LLAMA),
    "tied": (_tied, TIED),
    "tied-as-one": (_tied_as_one, TIED),
}


def world(root, kind, dtype, *, sharded=False, adapters=1):
    """A base in `dtype` and so many adapters of a kind."""
    maker, config = KINDS[kind]
    config = {**config, "dtype": str(models.DTYPES[dtype]).removeprefix("torch.")}
    tensors = (
        gpt2_tensors(dtype)
        if config["model_type"] == "gpt2"
        else llama_tensors(dtype, tied=config is TIED or bool(config["tie_word_embeddings"]))
    )
    made = [maker(root, index) for index in range(adapters)]
    return World(
        write_base(root / "base", tensors, config, sharded=sharded),
        [path for path, _ in made],
        set().union(*(touched for _, touched in made)),
    )
