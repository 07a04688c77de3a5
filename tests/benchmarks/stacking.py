"""What lowering the rank of a sum takes, by its rank, against the SVD of the dense matrix; and PEFT's whole operation.

python -m tests.benchmarks.stacking --work DIR [--peers PYTHON]   measures and keeps the result
python -m tests.benchmarks.stacking_page                          writes docs/stacking.md from it

Each cell is a process of its own, so that its peak of memory is; the time is that of the operation in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import measure
from tests.benchmarks.cases import HERE, OFFLINE, RANK, REPOSITORY, Setting

RESULT = HERE / "results" / "stacking.json"
SHAPES = ((768, 768), (4096, 4096), (14336, 4096))
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
KEPT = 16
RUNS = 3
DENSE, LARGEST_DENSE = 16, 4096
"""The dense way takes the same at every rank, and minutes beyond this size."""


def factors(shape: tuple[int, int], rank: int) -> tuple[Any, Any]:
    """Two adapters of half the rank each, alpha ≠ r."""
    import torch

    from loratools.adapters import Adapter, LowRank
    from loratools.tensors import in_memory

    generator = torch.Generator().manual_seed(rank)
    made = []
    for half in (rank - rank // 2, rank // 2):
        down = torch.randn(half, shape[1], generator=generator)
        up = torch.randn(shape[0], half, generator=generator)
        made.append(
            Adapter({"x": LowRank(lora_A=in_memory("A", down), lora_B=in_memory("B", up), alpha=1.5 * half)}, name="x")
        )
    return made[0], made[1]


def cores(shape: tuple[int, int], rank: int) -> dict[str, float]:
    """Ours: seconds of a sum and its truncation, peak memory of the process, how far from the best of its rank."""
    import torch

    first, second = factors(shape, rank)
    for _ in range(2):  # once to warm up
        begun = time.perf_counter()
        update = (0.7 * first + -1.3 * second).truncate(rank=min(KEPT, rank))["x"]
        took = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    halves = [(weight * each["x"].scaling, each["x"]) for weight, each in ((0.7, first), (-1.3, second))]
    left = torch.cat([scale * each.lora_B.load().double() for scale, each in halves], 1)
    right = torch.cat([each.lora_A.load().double() for _, each in halves])
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT
    rest = float(torch.linalg.svdvals(core)[min(KEPT, rank) :].square().sum())
    kept_left, kept_right = update.scaling * update.lora_B.load().double(), update.lora_A.load().double()
    joint = (
        torch.linalg.qr(torch.cat([left, -kept_left], 1)).R @ torch.linalg.qr(torch.cat([right, kept_right]).mT).R.mT
    )
    found = float(joint.square().sum())
    whole = float(core.square().sum())
    return {"seconds": took, "peak": peak, "gap": (found / rest) ** 0.5 - 1 if rest > 1e-12 * whole else 0.0}


def dense(shape: tuple[int, int], rank: int) -> dict[str, float]:
    """The way of the peers: ΔW whole in float32, and `torch.linalg.svd`."""
    import torch

    first, second = factors(shape, rank)
    begun = time.perf_counter()
    total = 0.7 * first["x"].delta_weight() - 1.3 * second["x"].delta_weight()
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    _ = u[:, :KEPT] * s[:KEPT], v[:KEPT]
    took = time.perf_counter() - begun
    return {"seconds": took, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def operation(first: str, second: str, out: str) -> dict[str, float]:
    """Ours on whole adapters: reading, decomposing, writing, syncing and hashing; imports are done."""
    import loratools as lt

    for _ in range(2):  # the first imports torch and whatever else is needed
        begun = time.perf_counter()
        lt.stack([first, second], out, rank=int(RANK), overwrite=True)
        took = time.perf_counter() - begun
    return {"operation_s": took}


def cell(words: list[str], python: str = sys.executable) -> dict[str, float]:
    """What a process of its own says last."""
    done = subprocess.run(
        [python, *words], check=True, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=environment()
    )
    return json.loads(done.stdout.strip().rpartition("\n")[2])  # type: ignore[no-any-return]


def environment() -> dict[str, str]:
    import os

    return {**os.environ, **OFFLINE}


def by_rank() -> list[dict[str, Any]]:
    """A row for every shape and rank."""
    rows = []
    for shape in SHAPES:
        for rank in (each for each in RANKS if each <= min(shape)):
            words = ["-m", "tests.benchmarks.stacking", "--cell", *map(str, (*shape, rank))]
            ours = [cell([*words, "cores"]) for _ in range(RUNS)]
            row: dict[str, Any] = {"shape": shape, "rank": rank, "cores": ours}
            if rank == DENSE and max(shape) <= LARGEST_DENSE:
                row["dense"] = [cell([*words, "dense"])]
            rows.append(row)
            print(row, flush=True)
    return rows


def against_peft(setting: Setting) -> dict[str, list[float]]:
    """Seconds of both operations, in turn."""
    two = [str(setting.input("155m", kind)) for kind in ("adapter", "second")]
    base, ours, theirs = (str(setting.input("155m", "base")), *(str(setting.output(x)) for x in ("stack", "peft")))
    found: dict[str, list[float]] = {"loratools": [], "peft": []}
    for _ in range(RUNS):
        found["loratools"].append(cell(["-m", "tests.benchmarks.stacking", "--operation", *two, ours])["operation_s"])
        peft = cell([str(HERE / "peft_stack.py"), base, *two, RANK, theirs], setting.peers)
        found["peft"].append(peft["operation_s"])
        print({key: statistics.median(values) for key, values in found.items()}, flush=True)
    return found


def main(arguments: list[str]) -> None:
    """Measure all, or one cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has peft")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--operation", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.cell:
        rows, columns, rank = map(int, asked.cell[:3])
        print(json.dumps({"cores": cores, "dense": dense}[asked.cell[3]]((rows, columns), rank)))
        return
    if asked.operation:
        print(json.dumps(operation(*asked.operation)))
        return
    record = {
        "schema": "loratools/benchmark-stacking/1",
        "machine": measure.machine(),
        "date": measure.now(),
        "commit": measure.commit(REPOSITORY),
        "versions": {"loratools": measure.versions(sys.executable), "peers": measure.versions(asked.peers)},
        "operation": against_peft(Setting(asked.work.absolute(), peers=asked.peers)),
        "rows": by_rank(),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
