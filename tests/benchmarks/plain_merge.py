"""The simplest honest merge: every tensor read once, W.float() + s·B@A rounded once, shards saved as they were.

    python plain_merge.py BASE ADAPTER OUT [--same-bits]

With `--same-bits`, the product of the factors is the one that has the same bits on every machine; all else is the same.

The yardstick for `loratools merge`. It has no report, no hashes, no checks, and is not atomic; it holds one shard of
the result in memory. A plain LoRA adapter in PEFT's layout is all it knows.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Added = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
PREFIX = "base_model.model."


def in_float32(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s·B@A, rounded once from float32."""
    return (weight.float() + scaling * (B.float() @ A.float())).to(weight.dtype)


def with_same_bits(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The same sum as `loratools merge` forms it."""
    from loratools.linalg import add_low_rank

    summed: torch.Tensor = add_low_rank(weight, [(A, B, scaling)])
    return summed


def merge(base: Path, adapter: Path, out: Path, added: Added = in_float32) -> None:
    """Merge `adapter` into `base`, shard by shard."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scaling = config["lora_alpha"] / config["r"]
    factors = load_file(adapter / "adapter_model.safetensors")
    out.mkdir(parents=True)
    for path in sorted(base.glob("*.json")):
        shutil.copy2(path, out / path.name)
    for shard in sorted(base.glob("*.safetensors")):
        save_file(merged_shard(shard, factors, scaling, added), out / shard.name, metadata={"format": "pt"})


def merged_shard(
    shard: Path, factors: dict[str, torch.Tensor], scaling: float, added: Added
) -> dict[str, torch.Tensor]:
    """All tensors of one shard, the adapted ones merged."""
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(shard, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, safe_open is no mapping
            weight = file.get_tensor(name)
            module = PREFIX + name.removesuffix(".weight")
            A, B = factors.get(f"{module}.lora_A.weight"), factors.get(f"{module}.lora_B.weight")
            if A is not None and B is not None:
                weight = added(weight, A, B, scaling)
            tensors[name] = weight
    return tensors


if __name__ == "__main__":
    same_bits = sys.argv[4:] == ["--same-bits"]
    merge(*map(Path, sys.argv[1:4]), with_same_bits if same_bits else in_float32)
