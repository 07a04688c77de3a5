"""`extract` on convolutions: stock PEFT loads what is written and computes what the tuned model does."""

import copy
import math

import pytest
import torch

from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.interop.convolutions import HAND_MADE, OF_TRANSFORMERS, answer, hand_made, of_transformers
from tests.interop.judge import load_cleanly, wrapped_modules

FULL = 512
"""A rank that no matrix of these models exceeds."""
RENAMED = {"vit": "layers."}
"""transformers 5 saves what is below by other names than the model in memory has, so no adapter from files fits it."""


def written(root, base, **how):
    """A hand-made network and a fine-tune of it, on disk and in memory."""
    tuned = models.tuned_from(base, **how)
    for name, net in (("base", base), ("tuned", tuned)):
        models.write_checkpoint(root / name, net.state_dict(), net.config)
    return tuned


def close(one, other, tolerance=1e-5):
    assert one.shape == other.shape
    assert (one - other).abs().max() <= tolerance * other.abs().max()


def plain(net):
    """Paths of the convolutions that have a low-rank form, by their torch classes."""
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {path for path, module in net.named_modules()
            if isinstance(module, kinds) and module.groups == 1 and module.in_channels > 1}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_full_rank_is_the_tuned_network(tmp_path, name):
    """Every kernel is low-rank in PEFT's own shapes, PEFT loads it without a word and computes what the tuned network
    does; merged by us it is the tuned network, and unmerged the base's bytes."""
    base = hand_made(name)
    tuned = written(tmp_path, base)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
    model = load_cleanly(copy.deepcopy(base), tmp_path / "adapter")
    linear = {path for path, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    assert wrapped_modules(model) == plain(base) | linear == {module["name"] for module in report.modules}
    with torch.no_grad():
        close(model(base.example()), tuned(base.example()))
    factors = models.factors_of(tmp_path / "adapter")
    for path in plain(base):
        kernel = base.get_submodule(path).kernel_size
        assert factors[f"base_model.model.{path}.lora_A.weight"].shape[1:] == (
            base.get_submodule(path).in_channels, *kernel,
        )  # fmt: skip
        assert factors[f"base_model.model.{path}.lora_B.weight"].shape[2:] == (1,) * len(kernel)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.tensors_of(tmp_path / "merged")
    for key, tensor in tuned.state_dict().items():
        assert merged[key].shape == tensor.shape
        assert (merged[key] - tensor).abs().max() <= 1e-6, key
    unmerge(tmp_path / "merged", tmp_path / "back", base=tmp_path / "base")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(tmp_path / "base")


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_models_of_transformers(tmp_path, name):
    """ConvNeXt, Wav2Vec2, HuBERT, ViT and others with everything changed: PEFT loads the adapter on the base without a
    missing key, an unexpected key or a warning, and gives the tuned model's answer."""
    base = of_transformers(name)
    tuned = models.tuned_from(base, only=lambda path: RENAMED.get(name, "nothing") not in path)
    models.save(base, tmp_path / "base")
    models.save(tuned, tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
    model = load_cleanly(models.load(tmp_path / "base", type(base)), tmp_path / "adapter")
    close(answer(model), answer(tuned))
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    close(answer(models.load(tmp_path / "merged", type(base))), answer(tuned))
    assert {module["name"] for module in report.modules} == wrapped_modules(model)
    assert math.isfinite(report.totals["captured"])
