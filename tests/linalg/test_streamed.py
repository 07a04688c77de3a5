"""A matrix that is read in chunks gives what the same matrix in memory gives."""

import math
import subprocess
import sys

import pytest
import torch

from loratools import linalg
from loratools.errors import NonFiniteError
from tests.linalg.spectra import KINDS, distance, lost_orthogonality, matrix, squares


class Counted:
    """70 rows at a time, in one buffer; counts the passes."""

    def __init__(self, M):
        self.M, self.passes = M, 0
        self.rows = linalg.ChunkedRows(tuple(M.shape), M.device, self.read)

    def read(self):
        self.passes += 1
        buffer = torch.empty(70, self.M.shape[1])
        for first in range(0, self.M.shape[0], 70):
            rows = self.M[first : first + 70]
            yield buffer[: len(rows)].copy_(rows)


def chunks(M):
    return Counted(M).rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(700, 400), (400, 700), (900, 60)])
def test_near_the_optimum_in_few_passes(kind, shape):
    M = matrix(kind, *shape)
    sigma2 = squares(M)
    for rank in (1, 6, 24):
        counted = Counted(M)
        U, S, Vh, info = linalg.truncated_svd(counted.rows, rank)
        assert (U.shape[0], Vh.shape[1]) == shape
        assert max(lost_orthogonality(U.T), lost_orthogonality(Vh)) < 1e-6
        true, best = distance(M, U, S, Vh), math.sqrt(float(sigma2[rank:].sum()))
        assert true <= best * 1.0015 + 6e-7 * info.norm
        assert info.residual == pytest.approx(
            true, rel=1e-5 if true > 1e-3 * info.norm else 1e-3, abs=1e-11 * info.norm
        )
        assert info.norm == pytest.approx(float(torch.linalg.vector_norm(M.double())), rel=1e-6)
        assert counted.passes <= 11


@pytest.mark.parametrize("goal", [{"energy": 0.9}, {"error": 0.03}, {"error": 1e-4}])
@pytest.mark.parametrize("kind", ["geometric", "power", "lora_bf16"])
def test_goals_are_those_of_the_matrix_in_memory(kind, goal):
    M = matrix(kind, 700, 500)
    held, streamed = linalg.truncated_svd(M, **goal)[3], linalg.truncated_svd(chunks(M), **goal)[3]
    assert (held.rank, held.reached) == (streamed.rank, streamed.reached)
    assert held.captured == pytest.approx(streamed.captured, abs=1e-5)


def test_magnitudes():
    M = matrix("power", 500, 400)
    U, S, _, info = linalg.truncated_svd(chunks(M * 2.0**100), 8)
    wanted = linalg.truncated_svd(chunks(M), 8)
    assert torch.equal(U, wanted[0])
    assert torch.equal(S, wanted[1] * 2.0**100)
    assert info.residual == wanted[3].residual * 2.0**100
    assert linalg.truncated_svd(chunks(torch.zeros(400, 300)), 8)[3].method == "zero"


@pytest.mark.parametrize("preset", ["fast", "certified", "exact"])
def test_presets(preset):
    M = matrix("power", 500, 400)
    U, S, Vh, info = linalg.truncated_svd(chunks(M), 8, preset=preset)
    best = math.sqrt(float(squares(M)[8:].sum()))
    assert distance(M, U, S, Vh) <= best * 1.001
    assert info.certificate_kind == {"fast": None, "certified": "proven", "exact": "proven"}[preset]


def test_non_finite_entries_are_counted():
    M = matrix("gaussian", 300, 290)
    M[3, 4] = M[200, 1] = math.nan
    M[250, 1] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        linalg.truncated_svd(chunks(M), 4)
    assert "3" in str(caught.value)


MEASURE = """
import sys, torch
from loratools import linalg
torch.set_num_threads(1)
m, n, rank = map(int, sys.argv[1:])
def G(seed):
    return torch.Generator().manual_seed(seed)
left, noise = torch.randn(m, 3, generator=G(1)), torch.randn(512, n, generator=G(2)) * 0.01
right, chunk = torch.randn(3, n, generator=G(3)), torch.zeros(512, n)
def read():
    for first in range(0, m, 512):
        yield torch.addmm(noise, left[first : first + 512], right, out=chunk)
def highest():  # not getrusage: that counts the parent's memory before exec, too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
linalg.truncated_svd(torch.randn(400, 300), 4)
before = highest()
info = linalg.truncated_svd(linalg.ChunkedRows((m, n), torch.device("cpu"), read), rank)[3]
print(1024 * (highest() - before), linalg.workspace_bytes(m, n, rank, streamed=True), info.rank)
"""


def measured(m, n, rank):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(m), str(n), str(rank)], capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


def test_memory_is_that_of_a_few_vectors():
    taken, bound, rank = measured(16384, 2048, 16)
    assert rank == 16
    assert taken <= bound + 2**21 < 4 * 16384 * 2048 // 4


@pytest.mark.slow
def test_a_vocabulary_within_half_a_gibibyte():
    """131,072 × 4,096, which in float32 takes 2 GiB."""
    taken, bound, _ = measured(131072, 4096, 16)
    assert taken < 2**29
    assert bound < 2**29
