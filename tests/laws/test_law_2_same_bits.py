"""Law 2: the same bits whatever the threads, the tiles and the process; one rounding."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loratools.engine import planning
from loratools.engine.context import Settings
from loratools.errors import LoratoolsError
from loratools.verbs.merge import merge
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.interop.extraction import stored_products
from tests.laws.kinds import EVERY_KIND
from tests.laws.worlds import DTYPES, KINDS, world

WEIGHTS = [0.7, -1.5, 2.0]


def outputs(made, kind, root, **options):
    """Hashes of what merge, unmerge and stack write; what is replaced or untied can be neither taken out nor added."""
    merge(made.base, made.adapters, root / "merged", weights=WEIGHTS, **options)
    found = [models.tensor_hashes(root / "merged")]
    if kind != "whole":
        stack(made.adapters, root / "sum", weights=WEIGHTS, **options)
        found.append(models.tensor_hashes(root / "sum", "adapter_model"))
    if kind not in {"whole", "tied"}:
        unmerge(root / "merged", root / "back", adapters=made.adapters, **options)
        found.append(models.tensor_hashes(root / "back"))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_tiles_do_not_show(tmp_path, monkeypatch, kind, dtype):
    """One, two or three threads, tiles of a row, of some, of everything: merge, unmerge and stack write the same."""
    made = world(tmp_path, kind, dtype, sharded=True, adapters=3)
    seen = []
    for threads, tile in ((1, None), (3, 1), (2, 700)):
        if tile is not None:
            monkeypatch.setattr(planning, "Settings", functools.partial(Settings, tile_bytes=tile))
        root = tmp_path / f"{threads}-{tile}"
        root.mkdir()
        seen.append(outputs(made, kind, root, threads=threads))
        monkeypatch.undo()
    assert all(each == seen[0] for each in seen[1:])


HOW = [(1, None), (2, 1), (8, 333)]
"""Threads, and bytes of a tile: everything at once, a row, some rows and an odd rest."""
MORE = [(1, None), (1, 1), (2, 71), (8, 1), (8, 4097)]


def merged_and_back(kind, root, made, threads):
    """Hashes of the merge, of its subtraction (or how that is refused), and of what --base brings back."""
    base, adapters = made
    merge(base, adapters, root / "merged", weights=[0.7, -1.5][: len(adapters)], threads=threads)
    found = [models.tensor_hashes(root / "merged")]
    try:
        unmerge(root / "merged", root / "less", adapters=adapters, threads=threads)
        found.append(models.tensor_hashes(root / "less"))
    except LoratoolsError as error:
        found.append(type(error).__name__)
    unmerge(root / "merged", root / "back", base=base, adapters=adapters, threads=threads)
    return [*found, models.tensor_hashes(root / "back")]


@pytest.mark.parametrize("how", [HOW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERY_KIND)
def test_threads_and_tiles_do_not_show_in_any_kind(tmp_path, monkeypatch, name, dtype, how):
    """Products and actions alike: with 1, 2 or 8 threads, in tiles of a row, of an odd number of bytes, of everything,
    merge and unmerge write the same bits."""
    kind = EVERY_KIND[name]
    base = kind.write_base(tmp_path / "base", dtype)
    adapters = [kind.write(tmp_path / f"adapter{seed}", seed) for seed in range(1, 3 if kind.twice else 2)]
    seen = []
    for threads, tile in how:
        if tile is not None:
            monkeypatch.setattr(planning, "Settings", functools.partial(Settings, tile_bytes=tile))
        root = tmp_path / f"{threads}-{tile}"
        root.mkdir()
        seen.append(merged_and_back(kind, root, (base, adapters), threads))
        monkeypatch.undo()
    assert all(each == seen[0] for each in seen[1:])
    assert seen[0][-1] == models.tensor_hashes(base)


SCRIPT = """
import json, sys
from pathlib import Path
from tests import models
from loratools.verbs.merge import merge
from loratools.verbs.stack import stack
import torch
torch.set_num_threads(int(sys.argv[2]))
root, target = Path(sys.argv[1]), Path(sys.argv[1]) / f"out{sys.argv[2]}"
target.mkdir()
adapters = sorted(root.glob("linear*"))
merge(root / "base", adapters, target / "merged", weights=[0.7, -1.5, 2.0])
stack(adapters, target / "sum", weights=[0.7, -1.5, 2.0])
print(json.dumps([models.tensor_hashes(target / "merged"), models.tensor_hashes(target / "sum", "adapter_model")]))
"""


def test_processes_with_other_thread_counts_do_not_show(tmp_path):
    """Three processes with OMP_NUM_THREADS 1, 2 and 3 write the same tensors."""
    world(tmp_path, "linear", "fp32", adapters=3)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(count)],
            env={**os.environ, "OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)},
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
        )
        for count in (1, 2, 3)
    ]  # fmt: skip
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "tied", "tied-as-one"])
def test_one_rounding(tmp_path, kind, dtype):
    """Every entry is round(W + Σ w ΔW): at most half a step from the exact sum, ΔW being right to 2e-7 of its size."""
    made = world(tmp_path, kind, dtype, adapters=3)
    merge(made.base, made.adapters, tmp_path / "merged", weights=WEIGHTS)
    before, after = models.tensors_of(made.base), models.tensors_of(tmp_path / "merged")
    products = [stored_products(adapter) for adapter in made.adapters]
    for name in made.touched:
        deltas = [weight * each[name.removesuffix(".weight")] for weight, each in zip(WEIGHTS, products, strict=True)]
        turned = "embed_tokens" in name or kind == "conv1d"
        change = sum(delta.T if turned else delta for delta in deltas)
        exact = before[name].double() + change
        slack = 2e-7 * sum(delta.norm() for delta in deltas)
        within = (after[name].double() - exact).abs() <= 0.5 * models.ulp(after[name], after[name].dtype) + slack
        assert bool(within.all()), name
        off = int((after[name] != exact.to(after[name].dtype)).sum())
        assert off <= (0.02 if dtype == "fp32" else 1e-3) * exact.numel() + 1, (name, off)


def test_weights_distribute(tmp_path):
    """One adapter twice with 0.5 is the adapter once: the sum is formed before it is rounded."""
    made = world(tmp_path, "linear", "bf16")
    merge(made.base, made.adapters, tmp_path / "once")
    merge(made.base, [made.adapters[0]] * 2, tmp_path / "twice", weights=[0.5, 0.5])
    once, twice = models.tensors_of(tmp_path / "once"), models.tensors_of(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in once)
