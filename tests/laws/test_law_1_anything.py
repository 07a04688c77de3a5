"""Law 1 over whatever hypothesis draws: bits of any kind in W, any ranks, sizes, weights and numbers of adapters."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratools.verbs.merge import merge
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.tiny import Q, lora_tensors, normal, write_adapter, write_checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORDS = {2: torch.int16, 4: torch.int32}
WEIGHTS = st.floats(-3, 3).filter(bool)


def any_finite(generator, shape, dtype):
    """Every bit pattern that is finite and so small that no sum overflows; zeros of both signs among them."""
    size = 8 * dtype.itemsize
    bits = torch.randint(-(2 ** (size - 1)), 2 ** (size - 1) - 1, shape, generator=generator)
    tensor = bits.to(WORDS[dtype.itemsize]).view(dtype)
    small = tensor.abs() < torch.finfo(dtype).max / 8
    zeros = torch.where(torch.rand(shape, generator=generator) < 0.5, -0.0, 0.0).to(dtype)
    return torch.where(small, tensor, zeros)


@st.composite
def cases(draw):
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    adapters = [
        (draw(st.integers(1, 9)), draw(st.floats(-4, 1)), draw(st.sampled_from(sorted(DTYPES))), draw(WEIGHTS))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return (rows, columns), adapters, draw(st.booleans()), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_the_base_comes_back_from_the_receipt(dtype, case):
    (rows, columns), sizes, wild, seed = case
    kept, generator = DTYPES[dtype], torch.Generator().manual_seed(seed)
    W = any_finite(generator, (rows, columns), kept) if wild else normal(seed, rows, columns, dtype=kept, scale=0.02)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        base = write_checkpoint(root / "base", {f"{Q}.weight": W, "beside.weight": normal(1, 3, 3)})
        adapters = []
        for index, (rank, exponent, factor, _) in enumerate(sizes):
            A = normal(seed + index, rank, columns, dtype=DTYPES[factor])
            B = normal(seed + 7 + index, rows, rank, dtype=DTYPES[factor], scale=0.02 * 10**exponent)
            adapters.append(write_adapter(root / f"a{index}", lora_tensors({Q: (A, B)}), r=rank, lora_alpha=rank + 1))
        weights = [weight for *_, weight in sizes]
        merge(base, adapters, root / "merged", weights=weights)
        unmerge(root / "merged", root / "back")
        assert models.tensor_hashes(root / "back") == models.tensor_hashes(base)
        if len(adapters) > 1:
            merge(base, adapters[1:], root / "fewer", weights=weights[1:])
            unmerge(root / "merged", root / "out", adapters=adapters[:1], weights=weights[:1])
            assert models.tensor_hashes(root / "out") == models.tensor_hashes(root / "fewer")
