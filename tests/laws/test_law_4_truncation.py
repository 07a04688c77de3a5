"""Law 4, truncated on disk: at most 1.001 of the best, and what is reported is true, whatever goes in."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapters import Adapter, LowRank
from loratools.files import load_adapter, save
from loratools.tensors import in_memory
from loratools.verbs.stack import stack
from tests import models

OUT, INTO = 9, 14
weights = st.sampled_from([1.0, -1.0, 0.3, -2.7, 0.0, 1e-4, 1e4])


@st.composite
def updates(draw):
    """Any rank, alpha, dtype; deficient, zero, 1e±4 large."""
    rank = draw(st.integers(1, 8))
    dtype = models.DTYPES[draw(st.sampled_from(["fp32", "bf16", "fp16"]))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([1.0, 1e-4, 1e4 if dtype != torch.float16 else 1e2]))
    down, up = torch.randn(rank, INTO, generator=generator), size * torch.randn(OUT, rank, generator=generator)
    shape = draw(st.sampled_from(["full", "deficient", "zero"]))
    if shape == "deficient":
        down[1:] = down[:1]
    elif shape == "zero":
        up.zero_()
    alpha = draw(st.sampled_from([1.0, 7.0, -2.0, float(rank)]))
    return LowRank(
        lora_A=in_memory("A", down.to(dtype)),
        lora_B=in_memory("B", up.to(dtype)),
        alpha=alpha,
        use_rslora=draw(st.booleans()),
    )


def exact(update):
    """ΔW in float64 by the formula."""
    size = update.lora_A.shape[0] ** (0.5 if update.use_rslora else 1)
    return update.alpha / size * update.lora_B.load().double() @ update.lora_A.load().double()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    members=st.lists(st.tuples(weights, updates()), min_size=1, max_size=3),
    twice=st.booleans(),
    rule=st.sampled_from([{"rank": 1}, {"rank": 4}, {"rank": 12}, {"energy": 0.95}, {"error": 0.2}]),
)
def test_truncation_is_near_the_best_and_told_as_it_is(members, twice, rule):
    """Negative and zero weights, duplicates, mixed ranks, alphas and dtypes, against a dense float64 SVD."""
    members = [*members, members[0]] if twice else members
    wanted = sum(weight * exact(update) for weight, update in members)
    largest = max(abs(weight) * float(exact(update).norm()) for weight, update in members)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for index, (_, update) in enumerate(members):
            save(Adapter({"x.lin": update}, name=str(index)), root / str(index))
        sources = [root / str(index) for index in range(len(members))]
        report = stack(sources, root / "out", weights=[weight for weight, _ in members], **rule)
        size, made = float(wanted.norm()), load_adapter(root / "out")
        if size <= 1e-12 * largest:
            return  # nothing but the rounding of float64 is left of it
        row = next(iter(report.modules))
        found = made["x.lin"].scaling * made["x.lin"].lora_B.load().double() @ made["x.lin"].lora_A.load().double()
        sigma = torch.linalg.svdvals(wanted)
        left = float((wanted - found).norm())
        noise = 3e-7 * size + 1e-14 * largest
        assert left <= 1.001 * float(sigma[row["rank"] :].norm()) + noise
        assert row["residual"] == pytest.approx(left / size, rel=1e-6, abs=1e-8 + 1e-14 * largest / size)
        assert row["captured"] == pytest.approx(1 - (left / size) ** 2, abs=1e-6)
        assert row["rank"] <= rule.get("rank", 256)
        if "energy" in rule:
            assert row["captured"] >= 0.95 - 1e-6
        if "error" in rule:
            assert row["residual"] <= 0.2 + 1e-6
