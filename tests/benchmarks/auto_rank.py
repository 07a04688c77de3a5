"""What `extract --rank auto` finds in merges of known rank: python -m tests.benchmarks.auto_rank prints the table.

Adapters of normal factors are added to weights of MiniLM and rounded once; the table stands in docs/guide/extract.md.
A cell gives the rank found in two matrices, and in brackets how many singular values of ΔW exceed the floor.
"""

import tempfile

import torch
from safetensors.torch import load_file

from loratools.linalg import RoundingNoise, truncated_svd
from tests.minilm import unpack

WEIGHTS = ("encoder.layer.2.attention.self.query.weight", "encoder.layer.3.intermediate.dense.weight")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RANKS = (4, 8, 16, 64)


def found(weight, dtype, relative, rank):
    """The rank found, and how many singular values of ΔW exceed the floor."""
    generator = torch.Generator().manual_seed(rank)
    base = weight.to(dtype)
    m, n = base.shape
    change = torch.randn(m, rank, generator=generator).double() @ torch.randn(rank, n, generator=generator).double()
    change *= relative * base.double().norm() / change.norm()
    tuned = (base.double() + change).to(dtype)
    difference = (tuned.double() - base.double()).float()
    noise = RoundingNoise.of_shape(m, n)
    noise.see(0, difference, base, tuned)
    floor = noise.floor(float(difference.norm()))
    info = truncated_svd(difference, floor=floor)[-1]
    return info.rank, int((torch.linalg.svdvals(change)[:rank] > floor).sum())


def main():
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(unpack(folder) / "model.safetensors")
    print(f"| dtype | ‖ΔW‖/‖W‖ | {' | '.join(f'rank {rank}' for rank in RANKS)} |")
    print("|---" * (2 + len(RANKS)) + "|")
    for name, dtype in DTYPES.items():
        for relative in SIZES:
            cells = []
            for rank in RANKS:
                both = [found(tensors[weight], dtype, relative, rank) for weight in WEIGHTS]
                cells.append(", ".join(f"{got} ({above})" for got, above in both))
            print(f"| {name} | {relative:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
