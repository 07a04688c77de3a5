"""Time `truncated_svd` beside torch.linalg.svd, torch.svd_lowrank and scikit-learn, alternating, in one process.

    python -m tests.benchmarks.kernel [--shape 768x768]... [--rank 16]... [-o tests/benchmarks/results/kernel.json]

One thread; a time is that thread's CPU time (on a GPU: wall time), the least of the rounds. `gap` is
‖M − M̂‖/optimum − 1, both norms in float64, the optimum from torch.linalg.svd of the same run. `matched` is our
kernel with the tolerance that svd_lowrank turned out to reach. `--device cuda` runs the same on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import torch
from torch.profiler import ProfilerActivity, profile

from loratools import linalg
from tests.benchmarks import measure

SHAPES = ("768x768", "2048x1408", "4096x4096", "4096x14336", "16x1024x704")
RANKS = (8, 16, 64, 128)
KINDS = ("lora", "finetune", "power", "flat", "outlier")
LEAST = 1e-6  # a gap below this is the rounding of float32: no tolerance to ask for
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def matrix(kind: str, m: int, n: int) -> torch.Tensor:
    """Float32: the difference of two bf16 checkpoints with a rank-16 update; 256 spikes i^-0.7 in noise; i^-0.75;
    noise; noise and one direction a thousand times as large."""
    generator = torch.Generator().manual_seed(m + n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "lora":
        base = (normal(m, n) * 0.02).bfloat16().float()
        return (base + normal(m, 16) @ normal(16, n) * 1e-3).bfloat16().float() - base
    if kind == "finetune":
        spikes = torch.arange(1, 257) ** -0.7 * 1.5 * (m**0.5 + n**0.5)
        return (normal(m, 256) / m**0.5 * spikes) @ (normal(256, n) / n**0.5) + normal(m, n) * 0.35
    if kind == "power":
        k = min(m, n)
        return (normal(m, k) * torch.arange(1, k + 1) ** -0.75) @ normal(k, n)
    if kind == "outlier":
        spike = normal(m, 1) / m**0.5 @ (normal(1, n) / n**0.5)
        return normal(m, n) + spike * 1000
    return normal(m, n)


def lowrank(M: torch.Tensor, rank: int) -> Factors:
    """The rival, as its users call it."""
    U, S, V = torch.svd_lowrank(M, q=rank + 8, niter=2)
    return U[:, :rank], S[:rank], V[:, :rank].T


def sklearn(M: torch.Tensor, rank: int) -> Factors:
    """scikit-learn's defaults."""
    from sklearn.utils.extmath import randomized_svd

    U, S, Vh = randomized_svd(M.cpu().numpy(), rank, random_state=0)
    return tuple(torch.from_numpy(each.copy()) for each in (U, S, Vh))


def distance(M: torch.Tensor, factors: Factors) -> float:
    U, S, Vh = (each.to(M.device).double() for each in factors[:3])
    left, total = U * S, 0.0
    for first in range(0, len(M), 512):
        total += float((M[first : first + 512].double() - left[first : first + 512] @ Vh).square().sum())
    return math.sqrt(total)


def timed(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.thread_time()  # the process's would count pools of others that spin for a while
        call()
        return time.thread_time() - start
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak(call: Callable[[], object]) -> int:
    """Most bytes that torch held at a time beyond what it held before; numpy's are not seen."""
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiled:
        call()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def worst(infos: Sequence[linalg.SVDInfo]) -> float | None:
    """The largest certificate, if all have one."""
    found = [info.certificate for info in infos]
    return None if None in found else max(found)


def cell(kind: str, matrices: list[torch.Tensor], rank: int, rounds: int, best: list[float], device: str) -> dict:
    """One cell; of several matrices the times are sums and the gaps the largest."""

    def gaps(method: Callable[[torch.Tensor], Factors]) -> float:
        return max(distance(M, method(M)) / optimum - 1 for M, optimum in zip(matrices, best, strict=True))

    rival = gaps(lambda M: lowrank(M, rank))
    matched = max(rival, LEAST)
    methods: dict[str, Callable[[torch.Tensor], Factors]] = {
        "default": lambda M: linalg.truncated_svd(M, rank),
        "matched": lambda M: linalg.truncated_svd(M, rank, tolerance=matched),
        "fast": lambda M: linalg.truncated_svd(M, rank, preset="fast"),
        "svd_lowrank": lambda M: lowrank(M, rank),
        "sklearn": lambda M: sklearn(M, rank),
    }
    if device != "cpu":
        del methods["sklearn"]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            seconds[name].append(sum(timed(lambda M=M, method=method: method(M), device) for M in matrices))
    infos = [linalg.truncated_svd(M, rank)[3] for M in matrices]
    memory = {}
    if kind == "flat" and device == "cpu":
        held = ("default", "matched", "svd_lowrank")
        memory = {name: peak(lambda name=name: methods[name](matrices[0])) for name in held}
    return {
        "kind": kind,
        "rank": rank,
        "seconds": {name: min(times) for name, times in seconds.items()},
        "spread": {name: max(times) / min(times) for name, times in seconds.items()},
        "gap": {name: rival if name == "svd_lowrank" else gaps(method) for name, method in methods.items()},
        "products": infos[0].products,
        "certificate": worst(infos),
        "peak": memory,
    }


def shape_cells(text: str, kinds: list[str], ranks: list[int], rounds: int, device: str) -> list[dict]:
    *count, m, n = (int(side) for side in text.split("x"))
    cells = []
    for kind in kinds:
        made = [matrix(kind, m + at, n + at)[:m, :n].contiguous() for at in range(count[0] if count else 1)]
        matrices = [each.to(device) for each in made]
        full, spectra = 0.0, []
        for M in matrices:
            held: list[torch.Tensor] = []
            full += timed(lambda M=M, held=held: held.append(torch.linalg.svd(M, full_matrices=False)[1]), device)
            spectra.append(held[0].double().square())
        for rank in ranks:
            best = [math.sqrt(float(squares[rank:].sum())) for squares in spectra]
            found = cell(kind, matrices, rank, rounds, best, device)
            cells.append({"shape": text, **found, "full": full})
            print(json.dumps(cells[-1]), flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", default=None, help="MxN, or COUNTxMxN")
    parser.add_argument("--rank", action="append", type=int, default=None)
    parser.add_argument("--kind", action="append", choices=KINDS, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=None)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for text in asked.shape or SHAPES:
        cells += shape_cells(text, asked.kind or list(KINDS), asked.rank or list(RANKS), asked.rounds, asked.device)
        if asked.output:
            asked.output.write_text(json.dumps({**origin(asked.device), "cells": cells}, indent=1) + "\n")


def origin(device: str) -> dict:
    """What was measured, where and when."""
    name = torch.cuda.get_device_name() if device != "cpu" else platform.machine()
    return {
        "schema": "loratools/benchmark-kernel/1",
        "machine": {**measure.machine(), "device": name, "torch": torch.__version__},
        "commit": measure.commit(Path(__file__).parent),
        "date": measure.now(),
    }


if __name__ == "__main__":
    main()
