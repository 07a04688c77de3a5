"""Whole commands on a real GPU against the CPU: `pytest -m gpu`."""

import pytest
import torch

from loratools import extract, merge
from tests.verbs.test_extract_streamed import deltas, experts, pair

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
assert pair  # a fixture


@pytest.mark.parametrize("options", [{"rank": 5}, {"energy": 0.9}, {"rank": "auto"}])
def test_extract(pair, tmp_path, options):
    here = extract(*pair, tmp_path / "here", device="cpu", **options)
    there = extract(*pair, tmp_path / "there", device="cuda", **options)
    for one, other in zip(here.modules, there.modules, strict=True):
        assert one["rank"] == other["rank"]
        assert one["residual"] == pytest.approx(other["residual"], rel=2e-3)
    for one, other in zip(deltas(tmp_path / "here"), deltas(tmp_path / "there"), strict=True):
        assert float((one - other).norm()) < 0.02 * float(one.norm())


def test_merge_gives_the_same_bytes(pair, tmp_path):
    extract(*pair, tmp_path / "adapter", rank=5)
    for device in ("cpu", "cuda"):
        merge(pair[0], [tmp_path / "adapter"], tmp_path / device, device=device)
    one, other = ((tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "cuda"))
    assert one == other


def test_experts_in_batches(tmp_path):
    sides = experts(tmp_path / "base", 0), experts(tmp_path / "tuned", 1)
    here = extract(*sides, tmp_path / "here", rank=5, device="cpu")
    there = extract(*sides, tmp_path / "there", rank=5, device="cuda")
    for one, other in zip(here.modules, there.modules, strict=True):
        assert one["residual"] == pytest.approx(other["residual"], rel=2e-3)
