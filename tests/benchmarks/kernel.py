"""Time `truncated_svd` beside torch.linalg.svd and torch.svd_lowrank, alternating, in one process.

    python -m tests.benchmarks.kernel --shape 1024x1024 --shape 4096x4096:nofull --rank 16 --rank 64

Prints one JSON document. Times are minima over the rounds; `gap` is ‖M − M̂‖/optimum − 1 where the optimum is known.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable

import torch

from loratools import linalg

KINDS = ("lora", "decay", "flat")


def matrix(kind: str, m: int, n: int) -> torch.Tensor:
    """A float32 test matrix: LoRA delta of two bf16 checkpoints, 1/sqrt(i)-like decay, or Gaussian noise."""
    generator = torch.Generator().manual_seed(m + n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "flat":
        return normal(m, n)
    if kind == "decay":
        weights = torch.arange(1, 513) ** -0.75
        return (normal(m, 512) * weights) @ normal(512, n)
    base = (normal(m, n) * 0.02).bfloat16().float()
    return (base + normal(m, 16) @ normal(16, n) * 1e-3).bfloat16().float() - base


def lowrank(M: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    U, S, V = torch.svd_lowrank(M, q=rank + 8, niter=2)
    return U[:, :rank], S[:rank], V[:, :rank].T


def distance(M: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> float:
    U, S, Vh = factors[:3]
    return float(torch.linalg.vector_norm(M.double() - (U.double() * S.double()) @ Vh.double()))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cell(kind: str, m: int, n: int, rank: int, rounds: int, spectrum: torch.Tensor | None) -> dict[str, object]:
    M = matrix(kind, m, n)
    sides = {
        "default": lambda: linalg.truncated_svd(M, rank),
        "fast": lambda: linalg.truncated_svd(M, rank, preset="fast"),
        "svd_lowrank": lambda: lowrank(M, rank),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            seconds[name].append(timed(call))
    best = float(spectrum[rank:].double().square().sum().sqrt()) if spectrum is not None else math.nan
    info = linalg.truncated_svd(M, rank)[3]
    return {
        "kind": kind,
        "shape": [m, n],
        "rank": rank,
        "ms": {name: round(min(times) * 1e3, 2) for name, times in seconds.items()},
        "spread": {name: round(max(times) / min(times), 2) for name, times in seconds.items()},
        "gap": {name: distance(M, call()) / best - 1 for name, call in sides.items()} if spectrum is not None else None,
        "products": info.products,
        "certificate": info.certificate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", default=None, help="MxN, with :nofull to skip the full SVD")
    parser.add_argument("--rank", action="append", type=int, default=None)
    parser.add_argument("--kind", action="append", choices=KINDS, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cells = []
    for shape in options.shape or ["1024x1024"]:
        size, _, skip = shape.partition(":")
        m, n = (int(side) for side in size.split("x"))
        for kind in options.kind or KINDS:
            spectrum, full = None, None
            if not skip:
                M = matrix(kind, m, n)
                start = time.perf_counter()
                spectrum = torch.linalg.svd(M, full_matrices=False)[1]
                full = round((time.perf_counter() - start) * 1e3, 1)
            for rank in options.rank or [16, 64]:
                cells.append({**cell(kind, m, n, rank, options.rounds, spectrum), "full_svd_ms": full})
    machine = {"platform": platform.platform(), "torch": torch.__version__, "threads": options.threads}
    print(json.dumps({"schema": "loratools/benchmark-kernel/1", "machine": machine, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
