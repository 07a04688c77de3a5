"""Law 3: `extract` at full rank, then `merge`, is the tuned checkpoint; at rank r it is the best of its rank."""

import pytest
import torch

from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from tests import models
from tests.laws.worlds import DTYPES, GPT2, LLAMA, TIED, gpt2_tensors, llama_tensors, noise, write_base


def pair(root, family, dtype, size, *, sharded=False):
    """A base and a tuned checkpoint in which every floating-point tensor changed."""
    config = {"llama": LLAMA, "tied": TIED, "gpt2": GPT2}[family]
    tensors = gpt2_tensors(dtype) if family == "gpt2" else llama_tensors(dtype, tied=family == "tied")
    tuned = {
        name: tensor + noise(tensor.shape, index, size).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for index, (name, tensor) in enumerate(tensors.items())
    }  # fmt: skip
    return write_base(root / "base", tensors, config, sharded=sharded), write_base(root / "tuned", tuned, config)


@pytest.mark.parametrize("size", [0.3, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
def test_full_rank_is_the_tuned_checkpoint(tmp_path, unchanged, family, dtype, size):
    """16 bits: within 1 ulp of max(|tuned entry|, rms ΔW); 32 bits: within 2e-6·‖ΔW‖. What is no matrix is equal."""
    base, tuned = pair(tmp_path, family, dtype, size, sharded=True)
    unchanged(base, tuned)
    report = extract(base, tuned, tmp_path / "adapter", rank=64)
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    before, wanted, found = (models.tensors_of(path) for path in (base, tuned, tmp_path / "merged"))
    assert set(found) == set(wanted)
    factored = {f"{module['name']}.weight" for module in report.modules}
    assert factored
    for name, tensor in wanted.items():
        if name not in factored:
            assert torch.equal(found[name], tensor), name
            continue
        delta = tensor.double() - before[name].double()
        error = (found[name].double() - tensor.double()).abs()
        if dtype == "fp32":
            assert error.norm() <= 2e-6 * delta.norm(), name
        else:
            rms = delta.norm() / delta.numel() ** 0.5
            assert bool((error <= models.ulp(tensor.double().abs().clamp_min(float(rms)), tensor.dtype)).all()), name


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_truncation_is_the_best_and_the_report_is_true(tmp_path, family, dtype, rank):
    """At rank r the residual is within 0.1 % of Eckart–Young, and is what merging at fp64 would leave."""
    base, tuned = pair(tmp_path, family, dtype, 0.1)
    report = extract(base, tuned, tmp_path / "adapter", rank=rank)
    before, after = models.tensors_of(base), models.tensors_of(tuned)
    factors = models.factors_of(tmp_path / "adapter")
    for module in report.modules:
        name = module["name"]
        keys = [key for key in factors if key.startswith(f"base_model.model.{name}.lora_")]
        down, up = (next(factors[key] for key in keys if f"_{side}" in key.split(name)[1]) for side in "AB")
        delta = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        kept = up.double() @ down.double()
        embedding = "lora_embedding_A" in "".join(keys)
        kept = kept.T if embedding or (family == "gpt2" and ".h." in name) else kept
        residual = float((delta - kept).norm() / delta.norm())
        best = float(torch.linalg.svdvals(delta)[rank:].norm() / delta.norm())
        assert module["residual"] == pytest.approx(residual, rel=1e-5, abs=3e-7)
        assert residual <= 1.001 * best + 3e-7
        assert module["captured"] == pytest.approx(float((kept.norm() / delta.norm()) ** 2), rel=1e-5)


def test_extraction_is_reproducible(tmp_path, monkeypatch):
    """The same seed writes the same bytes, with one thread or three."""
    base, tuned = pair(tmp_path, "llama", "bf16", 0.1)
    for threads in (1, 3):
        extract(base, tuned, tmp_path / f"adapter{threads}", rank=4, threads=threads)
    one, three = (models.file_hashes(tmp_path / f"adapter{threads}") for threads in (1, 3))
    assert [*one.values()] == [*three.values()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extracting_a_merge_gives_the_update_back(tmp_path, dtype):
    """The other way round: what a low-rank adapter did to a base, extract finds at that rank, up to the rounding of the
    merged weights."""
    from tests.interop.extraction import stored_products
    from tests.laws.worlds import world

    made = world(tmp_path, "linear", dtype)
    merge(made.base, made.adapters, tmp_path / "merged")
    report = extract(made.base, tmp_path / "merged", tmp_path / "again", rank=3)
    wanted, found = stored_products(made.adapters[0]), stored_products(tmp_path / "again")
    assert set(found) == set(wanted)
    assert not report.whole
    for path, delta in wanted.items():
        noise = float(models.ulp(models.tensors_of(made.base)[f"{path}.weight"], models.DTYPES[dtype]).norm())
        assert (found[path] - delta).norm() <= 2 * noise
