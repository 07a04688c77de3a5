import math

import pytest
import torch

from loratools.adapters import Full, LowRank, Sum, Term
from loratools.errors import MismatchError, UnsupportedError
from loratools.tensors import in_memory
from tests.tiny import normal


def low_rank(rank=4, m=6, n=5, alpha=8.0, dtype=torch.float32, **options):
    return LowRank(
        lora_A=in_memory("A", normal(1, rank, n, dtype=dtype)),
        lora_B=in_memory("B", normal(2, m, rank, dtype=dtype)),
        alpha=alpha,
        **options,
    )


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("alpha", [16.0, 0.5, -2.0, 0.0])
def test_scaling_is_alpha_over_rank(rank, alpha):
    """`alpha / r`, with rsLoRA `alpha / √r`."""
    assert low_rank(rank, alpha=alpha).scaling == alpha / rank
    assert low_rank(rank, alpha=alpha, use_rslora=True).scaling == alpha / math.sqrt(rank)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_delta_weight_is_the_formula(rslora, dtype):
    """(out, in), float32, `scaling · B A` in float64 rounded once."""
    update = low_rank(3, alpha=7.0, dtype=dtype, use_rslora=rslora)
    exact = (7.0 / (math.sqrt(3) if rslora else 3)) * (update.lora_B.load().double() @ update.lora_A.load().double())
    found = update.delta_weight()
    assert found.dtype == torch.float32
    assert found.shape == (6, 5) == update.shape
    torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=1e-12)


def test_a_sum_adds_its_terms():
    """Ranks add; scales are inside the terms."""
    one, two = low_rank(2), low_rank(3, alpha=-1.0)
    whole = Sum(parts=(*one.terms, *(Term(t.lora_A, t.lora_B, 0.5 * t.scale) for t in two.terms)))
    assert whole.rank == 5
    torch.testing.assert_close(
        whole.delta_weight(), one.delta_weight() + 0.5 * two.delta_weight(), rtol=1e-5, atol=1e-6
    )


def test_factors_that_are_no_product_are_refused_by_name():
    """Ranks that differ, or more than two axes."""
    with pytest.raises(MismatchError, match=r"\(4, 5\).*\(6, 3\).*weird"):
        LowRank(lora_A=in_memory("weird", normal(1, 4, 5)), lora_B=in_memory("B", normal(2, 6, 3)), alpha=1)
    with pytest.raises(MismatchError):
        LowRank(lora_A=in_memory("A", normal(1, 4, 5, 1)), lora_B=in_memory("B", normal(2, 6, 4, 1)), alpha=1)
    with pytest.raises(MismatchError, match="rank 0"):
        LowRank(lora_A=in_memory("A", normal(1, 0, 5)), lora_B=in_memory("B", normal(2, 6, 0)), alpha=1)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    """NaN would make every merged weight NaN."""
    with pytest.raises(MismatchError, match="alpha"):
        low_rank(alpha=alpha)


def test_a_whole_parameter_has_no_delta_of_its_own():
    """ΔW of a replacement depends on the base, and is refused rather than guessed."""
    full = Full(replaced={"weight": in_memory("w", normal(1, 3, 3))})
    assert (full.rank, full.shape, full.kind) == (None, None, "full")
    with pytest.raises(UnsupportedError, match="depends on the base"):
        full.delta_weight()
