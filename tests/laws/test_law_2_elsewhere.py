"""Law 2 across processes: other threads, tiles, instruction sets and BLAS, small numbers flushed: one hash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loratools as lt
from loratools.adapters import Adapter
from loratools.adapters.hra import Hra
from loratools.adapters.oft import Oft
from loratools.tensors import in_memory
from tests import models
from tests.laws.kinds import EVERY_KIND, OF_TODAY, Factors, dora, low_rank
from tests.laws.worlds import DTYPES, write_base

EXEMPT = {"fourierft"}
"""Its ΔW is an FFT."""
SMALL = sorted(name for name, kind in EVERY_KIND.items() if name not in EXEMPT and kind.written)


def rotated(make, out, into, *, rank):
    """By Cayley's transform, in blocks of 40."""
    return Oft(oft_R=make(into // 40, 40 * 39 // 2), neumann_terms=None)


def reflected(make, out, into, *, rank):
    return Hra(hra_u=make(into, rank), gram_schmidt=True)


LARGE = {f"wide-{dtype}": (dtype, low_rank) for dtype in (*DTYPES, "fp64")}
LARGE |= {f"wide-{maker.__name__}": ("fp64", maker) for maker in (dora, rotated, reflected)}
WIDE = {"a.lin.weight": (330, 520), "b.proj.weight": (520, 330)}

SETTINGS = {
    "one thread": ({"OMP_NUM_THREADS": "1"}, ["threads=1"]),
    "three threads, small tiles": ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}, ["threads=3", "tile=5000"]),
    "MKL compatible, plain kernels": ({"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}, []),
    "MKL and torch for AVX2": ({"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, ["threads=1", "tile=70000"]),
    "OpenBLAS": ({"PYTHONHASHSEED": "7"}, ["products=openblas"]),
    "another order": ({}, ["products=shuffled", "tile=3001"]),
    "small numbers flushed": ({}, ["flush=yes", "tf32=yes"]),
}
FEW = ("one thread", "MKL compatible, plain kernels", "another order", "small numbers flushed")


def elsewhere(root, out, environment, settings):
    """The hashes that a process with this environment prints."""
    out.mkdir()
    answer = subprocess.run(
        [sys.executable, "-m", "tests.laws.elsewhere", root, out, *settings],
        env={**os.environ, **environment}, cwd=Path(__file__).parents[2], check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(answer.stdout)


def with_empty_rows(make):
    """Factors that leave every third row of the weight alone, so that its small numbers are seen in the result."""

    def draw(*shape, **how):
        tensor = make(*shape, **how).load().clone()
        if len(shape) == 2 and shape[0] > shape[1]:
            tensor[::3] = 0
        return in_memory(f"drawn{shape}", tensor)

    return draw


def write_wide(directory, dtype, maker):
    """Matrices that a BLAS cuts into blocks, two adapters, and weights below the normal range."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in WIDE.items()}
    tensors = {name: tensor.to(models.DTYPES[dtype]) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor[::3, ::7] = torch.finfo(tensor.dtype).smallest_normal * 0.375
    write_base(directory / "base", tensors, {"dtype": str(models.DTYPES[dtype]).removeprefix("torch.")})
    for index in range(2):
        make = Factors(index, "bf16" if index else "fp32")
        make = with_empty_rows(make) if maker in {low_rank, dora} else make
        updates = {"a.lin": maker(make, 330, 520, rank=24)}
        if maker in {low_rank, dora}:  # the others have one rank, or size of a block, for all modules
            updates["b.proj"] = maker(make, 520, 330, rank=17)
        lt.save(
            Adapter(updates, name=f"wide{index}", config=OF_TODAY if maker is rotated else {}),
            directory / f"adapter{index}",
        )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory per kind and dtype. Kinds are merged into float64, where no rounding hides another order of a sum."""
    root = tmp_path_factory.mktemp("inputs")
    for name, (dtype, maker) in LARGE.items():
        write_wide(root / name, dtype, maker)
    for name in SMALL:
        kind = EVERY_KIND[name]
        kind.write_base(root / name / "base", "fp64")
        for seed in range(1, 3 if kind.twice else 2):
            kind.write(root / name / f"adapter{seed}", seed)
    return root


def test_what_is_exempt_says_so():
    """The kinds that are left out here are those that a merge goes on with on the same machine alone."""
    said = {name for name, kind in EVERY_KIND.items()
            if any(not update.everywhere for update in kind.updates(Factors(1, "fp32")).values())}  # fmt: skip
    assert said == EXEMPT


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(SETTINGS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_one_hash_everywhere(tmp_path, inputs, names):
    """Merged, restored, subtracted and stacked, reports and all: the same bytes in every process."""
    found = {name: elsewhere(inputs, tmp_path / name, *SETTINGS[name]) for name in names}
    wanted = found[names[0]]
    assert set(wanted) == {*SMALL, *LARGE}
    differing = {(name, kind) for name in names for kind in wanted if found[name][kind] != wanted[kind]}
    assert not differing
