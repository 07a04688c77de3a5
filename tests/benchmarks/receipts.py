"""How large receipts are: `python -m tests.benchmarks.receipts` stores the result and puts it on the format's page."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loratools.engine.receipts.manifest import RECEIPT_FILE
from loratools.verbs.merge import merge
from tests.tiny import PREFIX, Q, lora_tensors, normal, write_adapter, write_checkpoint

RESULT = Path(__file__).parent / "results" / "receipts.json"
PAGE = Path(__file__).parents[2] / "docs" / "formats" / "receipt.md"
RATIOS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPE = (2048, 1024)
RANK = 16
BEGIN, END = "<!-- sizes: generated -->\n", "<!-- end -->\n"


def measured(dtype: str, ratio: float, *, dora: bool) -> float:
    """Bits a weight of the section of one weight N(0, 0.02²), with ‖ΔW‖ = ratio · ‖W‖."""
    m, n = SHAPE
    W = normal(1, m, n, scale=0.02).to(DTYPES[dtype])
    A, B = normal(2, RANK, n), normal(3, m, RANK)
    B *= ratio * float(W.double().norm() / (B @ A).norm())
    tensors, config = lora_tensors({Q: (A, B)}), {}
    if dora:  # magnitudes as training leaves them: the norms, moved by as much as ΔW is
        norms = W.float().norm(dim=1) * (1 + ratio * normal(4, m) / 2)
        tensors[f"{PREFIX}{Q}.lora_magnitude_vector.weight"] = norms
        config = {"use_dora": True}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        base = write_checkpoint(root / "base", {f"{Q}.weight": W})
        adapter = write_adapter(root / "adapter", tensors, r=RANK, lora_alpha=RANK, **config)
        merge(base, [adapter], root / "merged")
        with safe_open(root / "merged" / RECEIPT_FILE, "np") as file:
            (row,) = json.loads(file.get_tensor("manifest").tobytes())["tensors"]
    nbytes = row["section"]["bytes"] if row["how"] == "corrected" else W.nbytes
    return 8 * nbytes / W.numel()


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    head = "| | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " |\n|:---|" + "---:|" * len(RATIOS) + "\n"
    return head + "".join(
        f"| {name} | " + " | ".join(f"{bits:.3f}" for bits in row) + " |\n" for name, row in result["bits"].items()
    )


def page(result: dict[str, Any]) -> str:
    """The page with the result in it."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(result) + END + rest.split(END)[1]


def main() -> None:
    """Measure, store, write the page."""
    bits = {
        f"{'DoRA' if dora else 'LoRA'}, {dtype}": [measured(dtype, ratio, dora=dora) for ratio in RATIOS]
        for dora in (False, True)
        for dtype in DTYPES
    }
    result = {"shape": list(SHAPE), "rank": RANK, "ratios": list(RATIOS), "bits": bits}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
