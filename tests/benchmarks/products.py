"""What it costs to have the same bits on every machine: ways of forming ΔW, and merges of one weight.

    python -m tests.benchmarks.products [-o tests/benchmarks/results/products.json]

One thread; a time is that thread's CPU time, the least of the rounds, all ways alternating in one process. `error` is
relative to ΔW in the Frobenius norm, against 80-bit floats. A way is `reproducible` if adding in another order, in
two halves, and by numpy's OpenBLAS gave the same bits as torch's BLAS.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import torch

from loratools import linalg
from tests.benchmarks import measure
from tests.benchmarks.product_ways import SAMPLED, WAYS, Way
from tests.laws import elsewhere

SHAPES = ((2048, 2048, 16), (2048, 2048, 64), (2048, 2048, 256), (4096, 1408, 16))
ROUNDS = 15
TILE = 2**18
SCALE = 0.7


def factors(m: int, n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, float32, Gaussian."""
    generator = torch.Generator().manual_seed(m + n + rank)
    return torch.randn(rank, n, generator=generator) * 0.02, torch.randn(m, rank, generator=generator) * 0.1


def whole(way: Way, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """All of ΔW, float64."""
    out = torch.zeros((B.shape[0], A.shape[1]), dtype=torch.float64)
    way(A, B, SCALE)(slice(0, B.shape[0]), out)
    return out


def timed(way: Way, A: torch.Tensor, B: torch.Tensor, out: torch.Tensor) -> float:
    """Prepare, then every tile into the same buffer."""
    step = out.shape[0]
    start = time.thread_time()
    fill = way(A, B, SCALE)
    for first in range(0, B.shape[0], step):
        fill(slice(first, first + step), out)
    return time.thread_time() - start


@contextmanager
def another(multiply: Callable[..., torch.Tensor] | None) -> Iterator[None]:
    """Products of matrices by another function."""
    kept = torch.mm, torch.matmul, torch._int_mm
    try:
        if multiply is not None:
            torch.mm = lambda a, b, out=None: multiply(a, b) if out is None else out.copy_(multiply(a, b))
        yield
    finally:
        torch.mm, torch.matmul, torch._int_mm = kept


def reproducible(way: Way) -> bool:
    """Whether all orders of addition gave one result, on a matrix small enough to try them."""
    found = []
    for shape in ((300, 200, 16), (200, 300, 64)):
        A, B = factors(*shape)
        for multiply in (None, elsewhere.openblas, elsewhere.shuffled):
            with another(multiply):
                found.append(whole(way, A, B))
        if not all(torch.equal(each, found[-1]) for each in found[-3:]):
            return False
    return True


def error(way: Way, A: torch.Tensor, B: torch.Tensor) -> float:
    """‖ΔW as computed − ΔW‖ / ‖ΔW‖, over some rows."""
    B = B[:256].contiguous()
    truth = np.longdouble(SCALE) * (B.numpy().astype(np.longdouble) @ A.numpy().astype(np.longdouble))
    off = whole(way, A, B).numpy() - truth
    return float(np.sqrt((off**2).sum() / (truth**2).sum()))


def ways(m: int, n: int, rank: int) -> dict[str, Any]:
    """All ways on one shape."""
    A, B = factors(m, n, rank)
    out = torch.empty((max(1, TILE // n), n), dtype=torch.float64)
    out = out[: max(step for step in range(1, len(out) + 1) if m % step == 0)]
    seconds = dict.fromkeys(WAYS, float("inf"))
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            if name in SAMPLED and seconds[name] < float("inf"):
                continue
            seconds[name] = min(seconds[name], timed(way, A, B, out) * (out.numel() / SAMPLED.get(name, out.numel())))
    errors = {name: error(way, A, B) for name, way in WAYS.items() if name not in SAMPLED}
    return {"shape": [m, n, rank], "seconds": seconds, "errors": errors}


def plain_merge(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """As `plain_merge.py` has it."""
    return (W.float() + SCALE * (B @ A)).to(W.dtype)


def merges(m: int, n: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """One weight merged the plain way and ours."""
    A, B = factors(m, n, rank)
    W = (torch.randn(m, n, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    sides = {"plain": lambda: plain_merge(W, A, B), "ours": lambda: linalg.add_low_rank(W, [(A, B, SCALE)])}
    seconds = dict.fromkeys(sides, float("inf"))
    for _ in range(ROUNDS):
        for name, side in sides.items():
            start = time.thread_time()
            side()
            seconds[name] = min(seconds[name], time.thread_time() - start)
    return {"shape": [m, n, rank], "dtype": str(dtype).removeprefix("torch."), "seconds": seconds}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "products.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = {
        "ways": [ways(*shape) for shape in SHAPES],
        "merges": [
            merges(*shape, dtype) for shape in SHAPES for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ],
        "reproducible": {name: reproducible(way) for name, way in WAYS.items()},
        "machine": {**measure.machine(), "torch": torch.__version__, "numpy": np.__version__},
        "rounds": ROUNDS,
        "commit": measure.commit(Path(__file__).parent),
        "date": measure.now(),
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
