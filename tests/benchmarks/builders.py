"""Build Llama-shaped checkpoint pairs and PEFT adapters for the benchmarks, straight to safetensors.

No model class is instantiated and torch is not imported: every tensor is drawn, rounded and written in blocks of
rows, so that a 3 GB checkpoint is built in a few hundred megabytes. Each tensor has its own generator, seeded by the
seed and its name, hence the same bytes whatever the sharding or the order. (The tuned kinds pass through a BLAS
product before they are rounded: another BLAS may move single entries by one unit in the last place.)

    python -m tests.benchmarks.builders 155m lora OUTDIR

builds `OUTDIR/155m/base` and `OUTDIR/155m/lora`, unless they are there already.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.shard_files import TensorEntry, open_tensors, write_checkpoint, write_file

WEIGHT_SCALE = 0.02  # the initializer_range of every Llama
RELATIVE_DELTA = 1e-2  # ‖ΔW‖/‖W‖ of an ordinary fine-tune
LORA_RANK = 16
SPIKES = 64  # directions of a fine-tune that stand out of its noise, about a third of them lie under its edge
SPIKE_DECAY = 0.7
SPIKE_ENERGY = 0.5  # share of ‖ΔW‖² in the spikes, the rest is the bulk
BLOCK_ENTRIES = 1 << 22  # 16 MiB of float32 at a time
ADAPTERS = {"adapter": 0, "second": 1}
"""Kind → what is added to the seed."""
KINDS = ("base", "lora", "finetune", *ADAPTERS)
RANKS = {"70b": 64}

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Blocks = Iterator[Matrix]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, and how large its shards are."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    shard_bytes: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """The adapted matrices of one layer, (out, in)."""
        kv = self.kv_heads * (self.hidden // self.heads)
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint in the order of transformers' own files."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes.update({f"{prefix}{name}.weight": size for name, size in self.projections().items()})
            shapes[f"{prefix}input_layernorm.weight"] = (self.hidden,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def config(self) -> dict[str, Any]:
        """What `AutoModelForCausalLM` needs to load the checkpoint."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


SIZES = {
    "tiny": Shape(64, 2, 4, 2, 176, 512, shard_bytes=100_000),
    # Unchanged embeddings are 131 MB of its 311 MB.
    "155m": Shape(1024, 7, 16, 16, 2816, 32000, shard_bytes=128_000_000),
    # TinyLlama's shape.
    "1.1b": Shape(2048, 22, 32, 4, 5632, 32000, shard_bytes=1_000_000_000),
    "3gb": Shape(2048, 23, 32, 8, 8192, 32000, shard_bytes=1_000_000_000),
    # Llama 3 70B's shape, for adapters.
    "70b": Shape(8192, 80, 64, 8, 28672, 128256, shard_bytes=4_000_000_000),
}


def generator(seed: int, *names: str) -> np.random.Generator:
    """A generator of its own for every tensor and purpose."""
    return np.random.Generator(np.random.SFC64([seed, *(zlib.crc32(name.encode()) for name in names)]))


def round_to_bf16(values: Matrix) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Round to nearest even, as every framework does; the values here are finite."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)


def widen_bf16(bits: np.ndarray[Any, np.dtype[np.uint16]]) -> Matrix:
    """Bfloat16 is the upper half of float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of whole rows that hold about `BLOCK_ENTRIES` entries each."""
    rows = max(1, BLOCK_ENTRIES // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def base_blocks(seed: int, name: str, shape: tuple[int, ...]) -> Blocks:
    """Normal weights; norms are one, as in a checkpoint that was just initialised."""
    if len(shape) == 1:
        yield np.ones(shape, np.float32)
        return
    rng = generator(seed, name)
    for block in row_blocks(shape):
        yield np.float32(WEIGHT_SCALE) * rng.standard_normal((block.stop - block.start, shape[1]), np.float32)


def lora_blocks(seed: int, name: str, shape: tuple[int, int]) -> Blocks:
    """The rows of B·A with Gaussian factors of rank 16 and ‖ΔW‖ = 1e-2·‖W‖."""
    rng = generator(seed, name, "lora")
    B = rng.standard_normal((shape[0], LORA_RANK), np.float32)
    A = rng.standard_normal((LORA_RANK, shape[1]), np.float32)
    A *= np.float32(RELATIVE_DELTA * WEIGHT_SCALE / math.sqrt(LORA_RANK))
    for block in row_blocks(shape):
        yield B[block] @ A


def finetune_blocks(seed: int, name: str, shape: tuple[int, int]) -> Blocks:
    """Singular values that fall like i^-0.7 and sink into a noise bulk: the hard case for a truncated SVD."""
    rng = generator(seed, name, "finetune")
    count = min(SPIKES, *shape)
    size = RELATIVE_DELTA * WEIGHT_SCALE * math.sqrt(shape[0] * shape[1])
    sigma = np.arange(1, count + 1) ** -SPIKE_DECAY
    sigma *= size * math.sqrt(SPIKE_ENERGY) / np.linalg.norm(sigma)
    # Long Gaussian vectors are orthogonal to about 1/√m: near enough to singular vectors for a benchmark.
    U = rng.standard_normal((shape[0], count), np.float32) / np.float32(math.sqrt(shape[0]))
    V = rng.standard_normal((count, shape[1]), np.float32) / np.float32(math.sqrt(shape[1]))
    V *= sigma[:, None].astype(np.float32)
    bulk = np.float32(RELATIVE_DELTA * WEIGHT_SCALE * math.sqrt(1 - SPIKE_ENERGY))
    for block in row_blocks(shape):
        noise = rng.standard_normal((block.stop - block.start, shape[1]), np.float32)
        yield U[block] @ V + bulk * noise


def build_base(folder: Path, size: str, seed: int) -> None:
    """Write the base checkpoint."""
    shape = SIZES[size]

    def produce(entry: TensorEntry) -> Iterator[bytes]:
        return (round_to_bf16(block).tobytes() for block in base_blocks(seed, entry.name, entry.shape))

    entries = [TensorEntry(name, "BF16", dims) for name, dims in shape.tensors().items()]
    write_checkpoint(folder, entries, produce, shape.shard_bytes)
    write_json(folder / "config.json", shape.config())


def build_tuned(folder: Path, base: Path, size: str, kind: str, seed: int) -> None:
    """Write base + delta, rounded; embeddings, head and norms keep the base's bytes."""
    shape = SIZES[size]
    deltas: Callable[..., Blocks] = {"lora": lora_blocks, "finetune": finetune_blocks}[kind]
    stored = open_tensors(base)

    def produce(entry: TensorEntry) -> Iterator[bytes]:
        place = stored[entry.name]
        raw = np.memmap(place.path, np.uint16, mode="r", offset=place.offset, shape=entry.shape)
        if ".layers." not in entry.name or len(entry.shape) == 1:
            return (raw[block].tobytes() for block in row_blocks(entry.shape))
        pairs = zip(row_blocks(entry.shape), deltas(seed, entry.name, entry.shape), strict=True)
        return (round_to_bf16(widen_bf16(raw[block]) + delta).tobytes() for block, delta in pairs)

    entries = [TensorEntry(name, "BF16", dims) for name, dims in shape.tensors().items()]
    write_checkpoint(folder, entries, produce, shape.shard_bytes)
    write_json(folder / "config.json", shape.config())


def build_adapter(folder: Path, model: str, rank: int = LORA_RANK, alpha: int = 2 * LORA_RANK, seed: int = 0) -> None:
    """Write a PEFT adapter for every projection of `model`, a name of `SIZES`.

    The factors are float32 and alpha differs from the rank, so that a merge which forgets the scaling, or computes in
    the checkpoint's precision, is not quietly compared as an equal.
    """
    entries: list[TensorEntry] = []
    for layer in range(SIZES[model].layers):
        for name, (rows, columns) in SIZES[model].projections().items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            entries.append(TensorEntry(f"{prefix}.lora_A.weight", "F32", (rank, columns)))
            entries.append(TensorEntry(f"{prefix}.lora_B.weight", "F32", (rows, rank)))
    # s·B·A has entries of alpha/rank·√rank·scale²: this makes ‖ΔW‖ = 1e-2·‖W‖ here too.
    scale = np.float32(math.sqrt(RELATIVE_DELTA * WEIGHT_SCALE * math.sqrt(rank) / alpha))

    def produce(entry: TensorEntry) -> Iterator[bytes]:
        yield (scale * generator(seed, entry.name, "adapter").standard_normal(entry.shape, np.float32)).tobytes()

    write_file(folder / "adapter_model.safetensors", entries, produce)
    write_json(folder / "adapter_config.json", adapter_config(model, rank, alpha))


def adapter_config(model: str, rank: int, alpha: int) -> dict[str, Any]:
    """The keys that PEFT reads to load a plain LoRA."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(name.rpartition(".")[2] for name in SIZES[model].projections()),
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write one JSON file."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def build(folder: Path, size: str, kind: str, seed: int = 0) -> Path:
    """Build one kind of one size under `folder`, its base first; what is complete is left alone."""
    target = folder / size / kind
    if target.exists():
        return target
    base = target if kind in {"base", *ADAPTERS} else build(folder, size, "base", seed)
    # A killed build must not pass for a finished one.
    partial = target.with_name(f"{kind}.building")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if kind == "base":
        build_base(partial, size, seed)
    elif kind in ADAPTERS:
        rank = RANKS.get(size, LORA_RANK)
        build_adapter(partial, size, rank, 2 * rank, seed + ADAPTERS[kind])
    else:
        build_tuned(partial, base, size, kind, seed)
    partial.rename(target)
    return target


def main(arguments: list[str]) -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description="Build benchmark checkpoints.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(build(options.folder, options.size, options.kind, options.seed))


if __name__ == "__main__":
    main(sys.argv[1:])
