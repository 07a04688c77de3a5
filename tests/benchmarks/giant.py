"""Build the headers of a terabyte: a mixture-of-experts checkpoint of 90 thousand tensors whose data is one hole.

    python -m tests.benchmarks.giant OUTDIR

The shapes are those of a large Qwen3 MoE; only headers, index and config take space on disk.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tests.benchmarks.shard_files import TensorEntry, shards, write_index, write_sparse

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 94, 318, 4096, 1536, 64, 4, 128, 151936
SHARDS = 163
CONFIG = f"""{{
  "architectures": ["Qwen3MoeForCausalLM"],
  "model_type": "qwen3_moe",
  "hidden_size": {HIDDEN},
  "moe_intermediate_size": {INTERMEDIATE},
  "num_hidden_layers": {LAYERS},
  "num_attention_heads": {HEADS},
  "num_key_value_heads": {KV_HEADS},
  "head_dim": {HEAD_DIM},
  "num_experts": {EXPERTS},
  "num_experts_per_tok": 8,
  "vocab_size": {VOCAB},
  "tie_word_embeddings": false,
  "torch_dtype": "bfloat16"
}}
"""


def layer_entries(layer: int) -> Iterator[TensorEntry]:
    """The tensors of one layer: attention, norms, router, experts."""
    prefix = f"model.layers.{layer}."
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield TensorEntry(f"{prefix}self_attn.q_proj.weight", "BF16", (queries, HIDDEN))
    yield TensorEntry(f"{prefix}self_attn.k_proj.weight", "BF16", (keys, HIDDEN))
    yield TensorEntry(f"{prefix}self_attn.v_proj.weight", "BF16", (keys, HIDDEN))
    yield TensorEntry(f"{prefix}self_attn.o_proj.weight", "BF16", (HIDDEN, queries))
    for norm, size in (("self_attn.q_norm", HEAD_DIM), ("self_attn.k_norm", HEAD_DIM)):
        yield TensorEntry(f"{prefix}{norm}.weight", "BF16", (size,))
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorEntry(f"{prefix}{norm}.weight", "BF16", (HIDDEN,))
    yield TensorEntry(f"{prefix}mlp.gate.weight", "BF16", (EXPERTS, HIDDEN))
    for expert in range(EXPERTS):
        inner = f"{prefix}mlp.experts.{expert}."
        yield TensorEntry(f"{inner}gate_proj.weight", "BF16", (INTERMEDIATE, HIDDEN))
        yield TensorEntry(f"{inner}up_proj.weight", "BF16", (INTERMEDIATE, HIDDEN))
        yield TensorEntry(f"{inner}down_proj.weight", "BF16", (HIDDEN, INTERMEDIATE))


def entries() -> list[TensorEntry]:
    """All tensors, in order."""
    embedding = TensorEntry("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN))
    last = [
        TensorEntry("model.norm.weight", "BF16", (HIDDEN,)),
        TensorEntry("lm_head.weight", "BF16", (VOCAB, HIDDEN)),
    ]
    return [embedding, *chain.from_iterable(map(layer_entries, range(LAYERS))), *last]


def parts() -> list[list[TensorEntry]]:
    """The tensors in exactly `SHARDS` shards of nearly equal size."""
    everything = entries()
    limit = -(-sum(entry.size for entry in everything) // SHARDS)
    found = shards(everything, limit)
    while len(found) > SHARDS:
        limit += limit // 1000
        found = shards(everything, limit)
    return found


def build(folder: Path) -> Path:
    """Write the checkpoint, unless it is there."""
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    found = parts()
    for path, part in zip(write_index(partial, found), found, strict=True):
        write_sparse(path, part)
    (partial / "config.json").write_text(CONFIG, encoding="utf-8")
    return partial.rename(folder)


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
