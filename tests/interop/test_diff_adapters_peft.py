"""`diff` of adapters that PEFT wrote, and of PEFT's own merges: against the ΔW that PEFT's layers compute."""

import copy

import pytest
import torch

from loratools.verbs.diff import diff
from tests import models
from tests.interop.merging import layers_of, products, unmerged, write_by_peft

TARGETS = {
    "llama": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "bert": ["query", "output.dense", "word_embeddings"],
}


@pytest.mark.parametrize("family", TARGETS)
def test_numbers_of_two_adapters(tmp_path, family):
    """Ranks, alphas and patterns that differ, rsLoRA, one in bf16; Linear, Conv1D and embeddings."""
    base = models.save(models.build(family), tmp_path / "base")
    turned = {"fan_in_fan_out": family == "gpt2"}
    targets = TARGETS[family]
    one = write_by_peft(base, tmp_path / "one", seed=1, r=4, lora_alpha=6, target_modules=targets, **turned)
    two = write_by_peft(base, tmp_path / "two", seed=2, r=5, lora_alpha=3, use_rslora=True, factors="bf16",
                        target_modules=targets, rank_pattern={targets[0]: 2}, alpha_pattern={targets[1]: 7},
                        **turned)  # fmt: skip
    deltas = [{path: products(layer) for path, layer in layers_of(unmerged(base, each)).items()} for each in (one, two)]
    report = diff(one, two)
    assert {row["name"] for row in report.modules} == set(deltas[0])
    for row in report.modules:
        a, b = (each[row["name"]] for each in deltas)
        assert row["norms"] == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-6)
        assert row["apart"] == pytest.approx(float((b - a).norm()), rel=1e-6)
        assert row["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-7)
    whole = [torch.cat([each[path].flatten() for path in deltas[0]]) for each in deltas]
    assert report.totals["apart"] == pytest.approx(float((whole[1] - whole[0]).norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_merge_by_peft_is_of_low_rank(tmp_path, dtype):
    """PEFT's merge and save of a rank-3 adapter of q and v: rank and modules are said, and nothing else."""
    model = models.build("llama")
    targets = ["q_proj", "v_proj"]
    base = models.save(model.to(models.DTYPES[dtype]), tmp_path / "base")
    adapter = write_by_peft(base, tmp_path / "adapter", seed=1, r=3, lora_alpha=30, size=2e-3, target_modules=targets)
    with models.quiet():
        merged = copy.deepcopy(unmerged(base, adapter)).merge_and_unload()
        models.save(merged, tmp_path / "merged")
    report = diff(base, tmp_path / "merged", spectrum=True)
    findings = {each["name"]: each for each in report.findings}
    assert findings["only modules"]["evidence"]["names"] == targets
    assert findings["low rank"]["evidence"] == {"ranks": {"3": 4}, "beside": 0}
    assert set(findings) == {"only modules", "low rank"}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("trained", ["all", "v_proj"])
def test_a_training_is_no_merge(tmp_path, dtype, steps, trained):
    """AdamW on random tokens, of all parameters or of some: nothing of low rank is said."""
    base = models.build("llama")
    models.save(base.to(models.DTYPES[dtype]), tmp_path / "base")
    tuned = copy.deepcopy(base).float()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(trained == "all" or trained in name)
    optimiser = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=2e-3)
    torch.manual_seed(3)
    for _ in range(steps):
        tokens = torch.randint(0, models.VOCABULARY, (2, 12))
        tuned(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    models.save(tuned.to(models.DTYPES[dtype]), tmp_path / "tuned")
    report = diff(tmp_path / "base", tmp_path / "tuned", spectrum=True)
    assert not report.same
    assert {each["name"] for each in report.findings} <= (
        {"every direction", "few rows"} if trained == "all" else {"only modules"}
    )


def test_a_matrix_of_adapters_that_peft_wrote(tmp_path):
    """Cosines and norms of PEFT's own ΔW, of adapters with other ranks, alphas, dtypes and targets; a copy is said."""
    base = models.save(models.build("llama"), tmp_path / "base")
    targets = TARGETS["llama"]
    made = [
        write_by_peft(base, tmp_path / f"n{at}", seed=at, r=rank, lora_alpha=2 * at + 1, use_rslora=at % 2 == 1,
                      target_modules=targets[at % 3 :], factors="bf16" if at == 2 else "fp32")
        for at, rank in enumerate((2, 3, 5, 8))
    ]  # fmt: skip
    report = diff(*made, made[1])
    deltas = [
        {path: products(layer) for path, layer in layers_of(unmerged(base, each)).items()} for each in (*made, made[1])
    ]
    paths = sorted({path for each in deltas for path in each})
    shapes = {path: delta.shape for each in deltas for path, delta in each.items()}
    flat = torch.stack(
        [torch.cat([each.get(path, torch.zeros(shapes[path])).double().flatten() for path in paths]) for each in deltas]
    )
    assert report.norms == pytest.approx(flat.norm(dim=1).tolist(), rel=1e-6)
    expected = (flat @ flat.T) / torch.outer(flat.norm(dim=1), flat.norm(dim=1))
    found = torch.tensor(report.cosines, dtype=torch.float64)
    assert float((found - expected).abs().max()) <= 1e-7
    assert any(note.startswith("n1 (5) has the same ΔW as n1 (2)") for note in report.notes)
