"""Products of large inner dimension: an iteration in place of the core, as good as promised, and told as it is."""

import pytest
import torch

from loratools.errors import MismatchError, NonFiniteError
from loratools.linalg import _product_krylov as product_krylov
from loratools.linalg import reduce_low_rank, truncate_low_rank

SHAPES = [(700, 600), (600, 700), (640, 640)]
INNER = 576


def factors(shape, inner=INNER, *, decay=0.0, dtype=torch.float32, size=1.0, seed=0):
    """A and B whose product has singular values that fall like i^-decay, nearly."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, inner + 1, dtype=torch.float32) ** -decay
    A = torch.randn(inner, shape[1], generator=generator) * fall[:, None] * size
    return A.to(dtype), (torch.randn(shape[0], inner, generator=generator) * size).to(dtype)


def left_over(A, B, down, up):
    """‖BA − Δ̂‖/‖BA‖ and the singular values of BA, dense in float64."""
    exact = B.double() @ A.double()
    return float((exact - up.double() @ down.double()).norm()), torch.linalg.svdvals(exact), float(exact.norm())


@pytest.mark.parametrize("rule", [{"rank": 4}, {"rank": 16}, {"rank": 60}, {"energy": 0.3}, {"error": 0.8}], ids=str)
@pytest.mark.parametrize("decay", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_near_the_best_and_told_as_it_is(shape, decay, rule):
    A, B = factors(shape, decay=decay)
    found = reduce_low_rank(A, B, **rule)
    left, sigma, norm = left_over(A, B, found.lora_A, found.lora_B)
    best = float(sigma[found.info.rank :].norm())
    assert left <= 1.001 * best + 3e-7 * norm
    assert found.info.residual == pytest.approx(left, rel=1e-6)
    assert found.info.captured == pytest.approx(1 - (left / norm) ** 2, abs=1e-6)
    assert found.info.norm == pytest.approx(norm, rel=1e-9)
    assert found.info.certificate is None or left <= (1 + found.info.certificate) * best * (1 + 1e-9)
    assert found.sigma2.sqrt() == pytest.approx(sigma[: found.info.rank], rel=1e-2)
    if "error" in rule:
        assert left <= 0.8 * norm * (1 + 1e-6)
    if "energy" in rule:
        assert found.info.captured >= 0.3 - 1e-6


@pytest.mark.parametrize("rule", [{"rank": 4}, {"rank": 16}, {"error": 0.9}], ids=str)
def test_it_is_the_iteration(rule):
    """Both ways in take it, no R×R matrix is decomposed, and equal inputs give equal bytes."""
    A, B = factors((700, 600))
    first, again = reduce_low_rank(A, B, **rule), reduce_low_rank(A, B, **rule)
    U, S, Vh, info = truncate_low_rank(A, B, **rule)
    assert first.info.method == info.method == "block-krylov"
    assert torch.equal(first.lora_A, again.lora_A)
    assert torch.equal(first.lora_B, again.lora_B)
    left, sigma, norm = left_over(A, B, Vh, U * S)
    assert left <= 1.001 * float(sigma[info.rank :].norm())
    assert info.residual == pytest.approx(left, rel=1e-5)
    assert norm == pytest.approx(info.norm)


@pytest.mark.parametrize(
    ("A", "B", "rule"),
    [
        pytest.param(*factors((700, 600), 128), {"rank": 4}, id="a small core"),
        pytest.param(*factors((700, 600)), {"rank": 200}, id="a large rank"),
        pytest.param(*factors((300, 200)), {"rank": 16}, id="a matrix so small that dense is as fast"),
        pytest.param(*factors((700, 600), decay=4.0), {"rank": 60}, id="hardly anything left over"),
        pytest.param(*factors((700, 600)), {"knee": True}, id="a rule that needs all singular values"),
        pytest.param(*factors((700, 600)), {"energy": 0.999}, id="more than the cap"),
    ],
)
def test_it_is_the_core(A, B, rule):
    """Where that is as fast, or the only one that is exact enough."""
    assert reduce_low_rank(A, B, **rule).info.method == "qr-core"


def test_terms_that_cancel_are_left_to_the_core():
    """What float32 products would lose: W − 0.9999 W and something small."""
    A, B = factors((700, 600), 288)
    small_A, small_B = factors((700, 600), 8, seed=1)
    up = torch.cat([B, -B, 1e-3 * small_B], 1)
    found = reduce_low_rank(torch.cat([A, A, small_A]), up, rank=4)
    left, sigma, norm = left_over(small_A, 1e-3 * small_B, found.lora_A, found.lora_B)
    assert found.info.method == "qr-core"
    assert left <= 1.001 * float(sigma[4:].norm()) + 1e-6 * norm


@pytest.mark.parametrize("size", [1e-15, 1e-4, 1e4, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_size_and_dtype(size, dtype):
    A, B = factors((700, 600), decay=0.5, size=size, dtype=dtype)
    found = reduce_low_rank(A, B, rank=16)
    left, sigma, _ = left_over(A, B, found.lora_A, found.lora_B)
    assert found.info.method == "block-krylov"
    assert left <= 1.001 * float(sigma[16:].norm())
    assert found.info.residual == pytest.approx(left, rel=1e-6)


def test_bad_factors_are_refused_first():
    A, B = factors((700, 600))
    with pytest.raises(MismatchError):
        reduce_low_rank(A[1:], B, rank=4)
    A[3, 5] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        truncate_low_rank(A, B, rank=4)
    assert "1" in str(caught.value)


def test_the_operator_is_the_product():
    """Products, chunks and distances, whichever side is the longer one; scaled by a power of two."""
    for shape in ((40, 30), (30, 40)):
        A, B = factors(shape, 50, size=2.0**40)
        matrix = product_krylov.ProductMatrix(A.double(), B.double())
        exact = torch.ldexp(B.double() @ A.double(), torch.tensor(-matrix.exponent))
        exact = exact.T if matrix.flipped else exact
        assert matrix.shape == exact.shape == (40, 30)
        rows, columns, out = torch.randn(3, 40), torch.randn(3, 30), torch.empty(3, 40)
        matrix.right_times(columns, out)
        assert (matrix.left_times(rows) - rows.double() @ exact).norm() <= 1e-5 * (rows.double() @ exact).norm()
        assert (out - columns.double() @ exact.T).norm() <= 1e-5 * (columns.double() @ exact.T).norm()
        whole = torch.cat([chunk.double() for _, chunk in matrix.chunks()])
        assert (whole - exact).norm() <= 1e-6 * exact.norm()
        assert matrix.total == pytest.approx(float(exact.square().sum()))
        gap = (exact - rows.double().T @ columns.double()).norm()
        assert matrix.distance(rows, columns, torch.float64) == pytest.approx(float(gap), rel=1e-5)
