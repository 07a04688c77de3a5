"""The kernel on a GPU that is not there: operands where they belong, nothing read behind the back, few waits."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from loratools import linalg
from tests.linalg.devices import CUDA, NoDevice, on_device, recorded, replayed
from tests.linalg.spectra import matrix

FEW = 11  # waits of a matrix besides one a block: 6 to 8, and a few more where a block has dependent rows


def same(one, other):
    """All facts; the last bits of a certificate depend on where in memory a small matrix lies."""
    certificates = one.certificate, other.certificate
    if None not in certificates:
        assert certificates[0] == pytest.approx(certificates[1], rel=1e-6)
        one = dataclasses.replace(one, certificate=other.certificate)
    assert one == other


def both(M, **options):
    """The result in a device's order on the CPU, the shapes on the device, the mode, the waits."""
    held, record = recorded(lambda: linalg.truncated_svd(M, **options))
    fake, mode, waits = replayed(lambda: linalg.truncated_svd(on_device(tuple(M.shape)), **options), record)
    return held, fake, mode, waits


@pytest.mark.parametrize("kind", ["lora_bf16", "gaussian", "power", "outlier"])
@pytest.mark.parametrize("shape", [(700, 400), (400, 700)])
@pytest.mark.parametrize("options", [{"rank": 16}, {"energy": 0.6}, {"rank": 8, "preset": "fast"}])
def test_everything_stays_on_the_device(kind, shape, options):
    held, fake, mode, waits = both(matrix(kind, *shape), **options)
    for one, other in zip(held[:3], fake[:3], strict=True):
        assert isinstance(other, FakeTensor)
        assert other.device == CUDA
        assert tuple(one.shape) == tuple(other.shape)
    assert mode.read == []
    same(held[3], fake[3])
    assert fake[3].method == "block-krylov"
    assert len(waits) <= fake[3].products // 2 + FEW
    assert max(sum(torch.Size(each).numel() for each in wait) for wait in waits) < 50_000  # never vectors of the matrix


def test_a_block_waits_once():
    M = matrix("gaussian", 900, 800)
    counts = {}
    for tolerance in (2e-2, 1e-4):
        held, _, _, waits = both(M, rank=16, tolerance=tolerance)
        counts[held[3].products // 2] = len(waits)
    (few, fewer), (many, more) = sorted(counts.items())
    assert many > few
    assert more - fewer == many - few


@pytest.mark.parametrize("options", [{"rank": 8, "preset": "exact"}, {"rank": 8, "preset": "certified"}])
def test_presets(options):
    held, fake, mode, _ = both(matrix("power", 500, 400), **options)
    assert mode.read == []
    same(held[3], fake[3])
    assert fake[3].certificate_kind == "proven"


def test_the_order_of_a_device_gives_the_same_result():
    M = matrix("lora_bf16", 700, 500)
    held, _ = recorded(lambda: linalg.truncated_svd(M, 16))
    plain = linalg.truncated_svd(M, 16)
    assert held[3].residual == pytest.approx(plain[3].residual, rel=1e-3)
    assert held[3].captured == pytest.approx(plain[3].captured, abs=1e-6)


def test_dependent_rows_take_the_careful_way():
    """What the hopeful way cannot do on the device is done over, with waits, not wrongly."""
    M = matrix("lora", 600, 500)
    held, fake, mode, _ = both(M, rank=24)
    assert held[3].rank == 6
    same(held[3], fake[3])
    assert mode.read == []


def test_the_mode_notices_what_it_is_for():
    with NoDevice() as mode:
        M = on_device((4, 3))
        with pytest.raises(DataDependentOutputException):
            torch.ops.aten._local_scalar_dense(M.sum())
        with pytest.raises(RuntimeError):
            float(M.sum())
        with pytest.raises(Exception, match="device"):
            M @ torch.ones(3, 2)
        M.cpu()
    assert mode.read


def test_the_merge_arithmetic_stays_on_the_device():
    with NoDevice() as mode:
        A, B, W = on_device((4, 30)), on_device((50, 4)), on_device((50, 30)).to(torch.bfloat16)
        found = linalg.low_rank_delta(A, B, 0.5)
        assert found.device == CUDA
        assert linalg.square_sums(found.double()).device == CUDA
        assert linalg.exact_product(B.double(), A.double()).device == CUDA
        assert linalg.inverse_of_positive(A.double().new_zeros(2, 20, 20)).device == CUDA
    assert mode.read == []
    assert W.device == CUDA


def test_whether_one_piece_will_do_is_one_wait():
    """The proof is on the device but for its last lines."""
    rank, down, up = 4, matrix("gaussian", 4, 30), matrix("gaussian", 50, 4)

    def prepared(A, B):
        return linalg.LowRankSum.of([(A, B, 0.5)], pieces=None)

    held, record = recorded(lambda: prepared(down, up))
    found, mode, waits = replayed(lambda: prepared(on_device((rank, 30)), on_device((50, rank))), record)
    assert mode.read == []
    assert len(waits) == 1
    assert held.left_rest is None
    assert found.left_rest is None
    assert found.left.device == CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run `pytest -m gpu`")
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lora_bf16", "gaussian", "power", "outlier"])
def test_a_real_device_agrees(kind):
    M = matrix(kind, 900, 700)
    here, there = linalg.truncated_svd(M, 16), linalg.truncated_svd(M.cuda(), 16)
    assert there[0].is_cuda
    assert there[3].residual == pytest.approx(here[3].residual, rel=1e-3, abs=1e-9 * here[3].norm)
    assert there[3].captured == pytest.approx(here[3].captured, abs=1e-4)
