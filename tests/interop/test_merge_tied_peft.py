"""One matrix, two uses: what is right is what PEFT's unmerged forward computes."""

import json

import pytest
import torch

from loratools.verbs.merge import merge
from tests import models
from tests.interop.extraction import assert_same_output, stored_products
from tests.interop.merging import merged_by_peft, unmerged, write_by_peft

CASES = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "weight-tying": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-weight-tying": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "neither": {"target_modules": ["q_proj"]},
}  # fmt: skip
STAY_TIED = ("weight-tying", "saved-weight-tying", "neither")


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_what_the_unmerged_does(bases, tmp_path, case, embeddings):
    """LoRA on the embedding, the head, both, both as one, or a saved copy: the merged logits are PEFT's unmerged
    ones; the configuration changes only where the two matrices come apart."""
    base = bases("qwen")
    adapter = write_by_peft(base, tmp_path / "adapter", r=4, lora_alpha=9, embeddings=embeddings, **CASES[case])
    merge(base, [adapter], tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    assert_same_output(merged, unmerged(base, adapter), 2e-5)
    before, after = (models.config_of(path, "config.json") for path in (base, tmp_path / "merged"))
    if case in STAY_TIED:
        assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
        assert "lm_head.weight" not in models.tensors_of(tmp_path / "merged")
    else:
        assert after == {**before, "tie_word_embeddings": False}
        assert list(after) == list(before)
        assert "lm_head.weight" in models.tensors_of(tmp_path / "merged")


def test_gpt2_as_one_matrix(bases, tmp_path):
    """GPT-2's names: LoRA on wte and lm_head under ensure_weight_tying is applied once, where PEFT's own merge
    applies it twice."""
    base = bases("gpt2")
    config = {"target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}
    adapter = write_by_peft(base, tmp_path / "adapter", r=4, lora_alpha=9, **config)
    stored = models.config_of(adapter)  # PEFT writes the head's factors, and forgets to list it
    targets = sorted({*stored["target_modules"], "lm_head"})
    (adapter / "adapter_config.json").write_text(json.dumps({**stored, "target_modules": targets}))
    merge(base, [adapter], tmp_path / "merged")
    model = unmerged(base, adapter)
    assert_same_output(models.load(tmp_path / "merged"), model, 2e-5)
    twice = merged_by_peft(model)["transformer.wte.weight"]
    assert not torch.allclose(models.tensors_of(tmp_path / "merged")["transformer.wte.weight"], twice, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("other", ["embedding", "head"])
def test_one_shared_update_and_one_that_is_not(bases, tmp_path, other, order):
    """An adapter that changes the matrix as one, and another that changes one use of it: each use gets what is
    meant for it, in either order."""
    base = bases("qwen")
    configs = [CASES["weight-tying"], CASES[other]]
    adapters = [write_by_peft(base, tmp_path / f"a{index}", seed=index, r=3, lora_alpha=4, **configs[index])
                for index in order]  # fmt: skip
    merge(base, adapters, tmp_path / "merged")
    ours, embedding = models.tensors_of(tmp_path / "merged"), models.tensors_of(base)["model.embed_tokens.weight"]
    stored = [stored_products(adapter) for adapter in adapters]
    for name, turn in (("model.embed_tokens", True), ("lm_head", False)):
        deltas = [each[name].T if turn else each[name] for each in stored if name in each]
        exact = embedding.double() + sum(deltas)
        assert (ours[f"{name}.weight"].double() - exact).abs().max() < 1e-7


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_shared_updates_stay_one_matrix(bases, tmp_path, order):
    """Two adapters that both keep the tie: the sum keeps it."""
    base = bases("qwen")
    config = CASES["weight-tying"]
    adapters = [write_by_peft(base, tmp_path / f"a{index}", seed=index, r=3, lora_alpha=4, **config) for index in order]
    merge(base, adapters, tmp_path / "merged", weights=[0.5, -2.0])
    ours, embedding = models.tensors_of(tmp_path / "merged"), models.tensors_of(base)["model.embed_tokens.weight"]
    assert "lm_head.weight" not in ours
    one, other = (stored_products(adapter)["model.embed_tokens"].T for adapter in adapters)
    exact = embedding.double() + 0.5 * one - 2.0 * other
    assert (ours["model.embed_tokens.weight"].double() - exact).abs().max() < 1e-7


def test_a_stored_copy_of_a_tied_head(tmp_path):
    """A checkpoint may store the tied head although it is the embedding: both copies follow a shared update."""
    model = models.build("qwen")
    models.save(model, tmp_path / "plain")
    tensors = models.tensors_of(tmp_path / "plain")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    base = models.write_checkpoint(tmp_path / "base", tensors, models.config_of(tmp_path / "plain", "config.json"))
    for case in ("weight-tying", "embedding", "head"):
        adapter = write_by_peft(base, tmp_path / case, r=3, lora_alpha=4, **CASES[case])
        merge(base, [adapter], tmp_path / f"merged-{case}")
        assert_same_output(models.load(tmp_path / f"merged-{case}"), unmerged(base, adapter), 2e-5)
