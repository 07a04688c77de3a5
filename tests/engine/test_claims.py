"""How far a merge may be from what it is held against covers how merges of ours form their products."""

import numpy as np
import pytest
import torch

from loratools.engine.operations.claims import Product, near_ours
from loratools.linalg import LowRankSum
from loratools.tensors import in_memory
from tests.linalg.test_same_bits import FACTORS, exact


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("rank", [2, 16, 250])
@pytest.mark.parametrize("factors", FACTORS)
def test_the_slack_for_our_own_products(factors, rank, pieces, transposed):
    """Entry by entry, for components of any sizes and shapes."""
    up, down = factors(90, 600, rank)
    up *= 10.0 ** torch.arange(-5, 5).repeat(rank)[:rank]
    made = LowRankSum.of([(down, up, 0.7)], transposed=transposed, pieces=pieces).delta(torch.float64)
    held = Product.of("a", [(in_memory("A", down), in_memory("B", up), 0.7)], transposed=transposed)
    truth = exact(up * 0.7, down)
    off = np.abs(made.numpy() - (truth.T if transposed else truth))
    slack = near_ours(rank, narrow=pieces == 1) * held.heights[:, None] * held.widths
    assert (off <= slack.numpy()).all()
