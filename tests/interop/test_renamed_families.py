"""Families whose modules transformers 5 renames on load: the data against transformers, and what users are told."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import loratools as lt
from loratools.checkpoints.renamed import RENAMED_FAMILIES
from loratools.errors import MismatchError
from tests import models

KNOWN = {"vit", "dinov2", "gpt_neox", "llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "paligemma"}
PLAIN = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gpt2", "bert", "phi3", "t5", "deepseek_v3"}


def renamed_by_transformers():
    """`model_type` of every entry of its mapping that renames anything but experts."""
    import transformers
    from transformers import conversion_mapping

    defined = {}
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for name in re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            defined.setdefault(name, file)
    found = set()
    for name, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        patterns = [source for each in transforms for source in each._original_source_patterns]
        if all("experts" in source or "block_sparse_moe" in source for source in patterns):
            continue
        if name not in defined:
            found.add(name)
            continue
        file = defined[name]
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        found.add(getattr(getattr(module, name).config_class, "model_type", None))
    return found


def test_the_data_is_transformers():
    """No family without a renaming there; the well-known ones are in, and those without one are not."""
    assert not RENAMED_FAMILIES - renamed_by_transformers()
    assert KNOWN <= RENAMED_FAMILIES
    assert not PLAIN & RENAMED_FAMILIES


def vit(directory):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16,
                       patch_size=8)  # fmt: skip
    model = ViTModel(config).eval()
    base = models.save(model, directory / "base")
    tuned = models.save(models.disturbed(model, 0.05, only=lambda name: "proj" in name), directory / "tuned")
    return base, tuned


def test_extract_says_it_and_merge_takes_it(tmp_path):
    base, tuned = vit(tmp_path)
    assert any("attention.query" in name for name in models.tensors_of(base))
    plan = lt.plan_extract(base, tuned, tmp_path / "adapter", rank=64)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=64)
    for notes in (plan.notes, report.notes):
        assert any("transformers 5 calls modules of vit otherwise" in note for note in notes)
    lt.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged, wanted = models.tensors_of(tmp_path / "merged"), models.tensors_of(tuned)
    assert all(torch.allclose(merged[name], tensor, atol=1e-5) for name, tensor in wanted.items())


@pytest.mark.parametrize(("family", "renamed"), [("vit", True), ("llama", False)])
def test_merge_says_it_of_modules_that_are_not_there(family, renamed, tmp_path):
    base, _ = vit(tmp_path)
    base = models.write_checkpoint(tmp_path / "stored", models.tensors_of(base), {"model_type": family})
    factors = {"base_model.model.layers.0.attention.q_proj.lora_A.weight": torch.ones(2, 16),
               "base_model.model.layers.0.attention.q_proj.lora_B.weight": torch.ones(16, 2)}  # fmt: skip
    adapter = models.write_adapter(
        tmp_path / "adapter", factors, {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    )
    with pytest.raises(MismatchError) as raised:
        lt.merge(base, [adapter], tmp_path / "merged")
    assert ("not mapped to the file's names" in str(raised.value)) == renamed
    assert ("Is this the base" in str(raised.value)) != renamed
