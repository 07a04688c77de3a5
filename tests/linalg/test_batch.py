"""Matrices of one shape together give what each gives alone."""

import math

import pytest
import torch

from loratools import linalg
from loratools.errors import NonFiniteError
from tests.linalg.devices import CUDA, on_device, recorded, replayed
from tests.linalg.spectra import distance, lost_orthogonality, matrix, squares

KINDS = ("lora_bf16", "power", "gaussian", "geometric", "outlier")


def together(matrices, *args, **options):
    """As on a device, on the CPU; what went through `to_host` besides."""
    return recorded(lambda: linalg.truncated_svd_batch(matrices, *args, **options))


@pytest.mark.parametrize("shape", [(600, 400), (400, 600)])
@pytest.mark.parametrize("rank", [8, 24])
def test_each_is_near_its_optimum(shape, rank):
    matrices = [matrix(kind, *shape, seed=seed) * 2.0 ** (40 * (seed - 2)) for seed, kind in enumerate(KINDS)]
    found, record = together(matrices, rank)
    for M, (U, S, Vh, info) in zip(matrices, found, strict=True):
        sigma2 = squares(M)
        best = math.sqrt(float(sigma2[rank:].sum()))
        assert max(lost_orthogonality(U.T), lost_orthogonality(Vh)) < 1e-6
        true = distance(M, U, S, Vh)
        assert true <= best * 1.001 + 1e-6 * info.norm
        assert info.residual == pytest.approx(true, rel=1e-5 if true > 1e-3 * info.norm else 1e-3)
        assert info.certificate is None or info.certificate >= true / best - 1 - 1e-9
    waits = [shapes for shapes in record if any(each.dim() == 3 for each in shapes)]
    assert len(waits) <= 6, "one a block for all of them"


def test_what_cannot_be_done_together_is_done_alone():
    """Dependent rows, nothing at all: beside others, and those are not the worse for it."""
    matrices = [matrix("lora", 500, 400), torch.zeros(500, 400), matrix("power", 500, 400)]
    found, _ = together(matrices, 16)
    assert [info.rank for *_, info in found] == [6, 0, 16]
    alone = linalg.truncated_svd(matrices[2], 16)[3]
    assert found[2][3].residual == pytest.approx(alone.residual, rel=1e-3)
    assert distance(matrices[0], *found[0][:3]) < 1e-6 * found[0][3].norm


def test_on_the_cpu_one_after_the_other():
    matrices = [matrix("power", 400, 300, seed=seed) for seed in range(3)]
    for one, other in zip(linalg.truncated_svd_batch(matrices, 8), matrices, strict=True):
        alone = linalg.truncated_svd(other, 8)
        assert all(torch.equal(a, b) for a, b in zip(one[:3], alone[:3], strict=True))
    assert linalg.truncated_svd_batch([], 8) == []


@pytest.mark.parametrize("preset", ["certified", "exact", "fast"])
def test_presets(preset):
    found, _ = together([matrix("power", 400, 300, seed=seed) for seed in range(2)], 8, preset=preset)
    kind = {"certified": "proven", "exact": "proven", "fast": None}[preset]
    assert {info.certificate_kind for *_, info in found} == {kind}


def test_non_finite_entries_are_counted():
    matrices = [matrix("power", 400, 300), matrix("gaussian", 400, 300)]
    matrices[1][3, 4] = math.nan
    with pytest.raises(NonFiniteError):
        together(matrices, 8)


def test_everything_stays_on_the_device():
    matrices = [matrix(kind, 500, 400) for kind in KINDS]
    held, record = together(matrices, 16)
    fake, mode, waits = replayed(
        lambda: linalg.truncated_svd_batch([on_device((500, 400)) for _ in matrices], 16), record
    )
    assert mode.read == []
    assert {each.device for result in fake for each in result[:3]} == {CUDA}
    assert [info.rank for *_, info in fake] == [info.rank for *_, info in held]
    assert sum(any(len(shape) == 3 for shape in wait) for wait in waits) <= 6


def test_batches_keep_to_a_gibibyte():
    count = linalg.batch_size(1024, 704)
    assert 12 * 1024 * 704 * count <= 2**30 < 12 * 1024 * 704 * (count + 1)
    assert linalg.batch_size(10**5, 10**5) == 1
