"""`extract` on convolutions: stock PEFT loads what is written and computes what the tuned model does."""

import copy
import math

import pytest
import torch

from loratools.errors import MismatchError, UnsupportedError
from loratools.verbs.extract import extract, plan_extract
from loratools.verbs.merge import merge
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.interop import convolutions
from tests.interop.convolutions import HAND_MADE, OF_TRANSFORMERS, answer, hand_made, of_transformers
from tests.interop.judge import load_cleanly, saved_modules, wrapped_modules

FULL = 512
"""A rank that no matrix of these models exceeds."""
GROUPS = ["ConvNd layer with groups"]
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_is_the_best_of_the_flattened_kernel(tmp_path, dtype, rank):
    """At rank r a kernel's residual is that of Eckart-Young over (out, in·k·…), in the report and in what PEFT's own
    `get_delta_weight` makes of the factors; in 16 bits too."""
    base = hand_made("unet").to(models.DTYPES[dtype])
    tuned = written(tmp_path, base, size=0.2)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=rank)
    model = load_cleanly(copy.deepcopy(base), tmp_path / "adapter")
    seen = 0
    for module in report.modules:
        layer = model.get_submodule(f"base_model.model.{module['name']}")
        delta = tuned.get_parameter(f"{module['name']}.weight").double() - layer.get_base_layer().weight.double()
        theirs = layer.get_delta_weight("default").double()
        values = torch.linalg.svdvals(delta.flatten(1).detach())
        best = float(values[rank:].norm() / values.norm())
        found = float((theirs - delta).norm() / delta.norm())
        assert found == pytest.approx(best, rel=1e-3, abs=1e-6), module["name"]
        assert module["residual"] == pytest.approx(found, rel=1e-4, abs=1e-6)
        seen += delta.dim() > 2
    assert seen == len(plain(base))


@pytest.mark.parametrize("rule", [{"energy": 0.8}, {"error": 0.3}])
def test_ranks_differ_by_module(tmp_path, rule):
    """A rank per kernel, in PEFT's patterns: it loads each with its own, and reaches what was asked for."""
    base = hand_made("unet")
    tuned = written(tmp_path, base)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", **rule)
    model = load_cleanly(copy.deepcopy(base), tmp_path / "adapter")
    ranks = {module["name"]: module["rank"] for module in report.modules}
    assert len(set(ranks.values())) > 2
    for path, rank in ranks.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        assert layer.r["default"] == rank
        delta = (tuned.get_parameter(f"{path}.weight") - base.get_parameter(f"{path}.weight")).double()
        residual = float((layer.get_delta_weight("default").double() - delta).norm() / delta.norm())
        assert residual <= rule.get("error", (1 - rule.get("energy", 0)) ** 0.5) + 1e-5


def test_what_has_no_low_rank_form_is_whole_and_said(tmp_path):
    """Depthwise, one channel, transposed: whole under `modules_to_save`, with their biases, named with the reason;
    with --only-low-rank left out and named."""
    base = hand_made("signals")
    tuned = written(tmp_path, base)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=4)
    whole = {"mono.weight", "depthwise.weight", "depthwise.bias", "deconv.weight", "deconv.bias"}
    assert set(report.whole) == whole | {"strided.bias", "point.bias", "out.bias"}
    said = " ".join(report.notes)
    assert "a depthwise convolution, and saves nothing over a single channel: depthwise and 1 more." in said
    assert "a transposed convolution: deconv." in said
    model = load_cleanly(copy.deepcopy(base), tmp_path / "adapter")
    assert saved_modules(model) == {"mono", "depthwise", "deconv"}
    for name in whole:
        assert torch.equal(
            models.factors_of(tmp_path / "adapter")[f"base_model.model.{name}"], tuned.get_parameter(name)
        )
    low = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "low", rank=4, only_low_rank=True)
    assert set(low.left_out) == set(report.whole)
    assert saved_modules(load_cleanly(copy.deepcopy(base), tmp_path / "low")) == set()


class Hidden(convolutions.Net):
    """Groups of several channels, a dilation and a circular padding: no file tells of them."""

    def __init__(self):
        super().__init__()
        self.grouped = torch.nn.Conv2d(4, 8, 3, groups=2)
        self.dilated = torch.nn.Conv2d(8, 6, 3, dilation=2, padding=2)
        self.circular = torch.nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.circular(torch.relu(self.dilated(torch.relu(self.grouped(x)))))


def test_what_no_file_tells_is_noted_and_can_be_kept_whole(tmp_path):
    """PEFT's LoRA refuses the grouped kernel's shape, and forgets dilation and padding mode: the note says so, our
    merge is right in any case, and with --save-full PEFT is too."""
    torch.manual_seed(0)
    base = Hidden()
    tuned = written(tmp_path, base)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
    assert any("groups, dilation or a padding" in note and "--save-full" in note for note in report.notes)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_cleanly(copy.deepcopy(base), tmp_path / "adapter", expected=GROUPS)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    for name, tensor in models.tensors_of(tmp_path / "merged").items():
        assert (tensor - tuned.state_dict()[name]).abs().max() <= 1e-6
    x = torch.randn(2, 4, 9, 9)
    for name, channels in (("dilated", 8), ("circular", 6)):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / name, rank=FULL, include=[name])
        model = load_cleanly(copy.deepcopy(base), tmp_path / name)
        layer, seen = model.base_model.model.get_submodule(name), torch.randn(2, channels, 9, 9)
        with torch.no_grad():
            if name == "dilated":
                with pytest.raises(RuntimeError, match="size of tensor"):
                    layer(seen)
            else:
                assert (layer(seen) - tuned.get_submodule(name)(seen)).abs().max() > 1e-3
    kept = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "kept", rank=FULL, save_full=list(base._modules))
    assert not any("dilation" in note for note in kept.notes)
    with torch.no_grad():
        close(load_cleanly(copy.deepcopy(base), tmp_path / "kept")(x), tuned(x))


def test_peft_cannot_merge_some_kernels_that_it_runs(tmp_path):
    """Kernels (1, 1, 1) and (1, 1, k) of three axes end PEFT's own merge in an error; its forward and our merge agree
    with the tuned network (see `test_full_rank_is_the_tuned_network`)."""
    base = hand_made("volumes")
    written(tmp_path, base)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
    model = load_cleanly(copy.deepcopy(base), tmp_path / "adapter")
    with pytest.raises((RuntimeError, IndexError)):
        model.merge_and_unload()


@pytest.mark.parametrize("name", ["unet", "signals"])
def test_peft_merges_to_the_tuned_network(tmp_path, name):
    """PEFT's merge_and_unload of the extracted adapter is the tuned network, for kernels of one and two axes."""
    base = hand_made(name)
    tuned = written(tmp_path, base)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
    merged = load_cleanly(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload().state_dict()
    for key, tensor in tuned.state_dict().items():
        assert (merged[key] - tensor).abs().max() <= 1e-6, key


def test_statistics_and_counters_come_along(tmp_path):
    """A BatchNorm that trained has other statistics and another integer counter: PEFT sets them, our merge writes the
    counter's bytes, and unmerging with the base brings the old ones back; a counter of another dtype is refused."""
    base = of_transformers("resnet")
    tuned = models.tuned_from(base)
    for path, module in tuned.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked += 3
            module.running_mean += 0.1 * len(path)
    models.save(base, tmp_path / "base")
    models.save(tuned, tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
    model = load_cleanly(models.load(tmp_path / "base", type(base)), tmp_path / "adapter")
    close(answer(model), answer(tuned))
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.tensors_of(tmp_path / "merged")
    counters = [key for key in merged if key.endswith("num_batches_tracked")]
    assert counters
    assert all(merged[key].dtype == torch.int64 and int(merged[key]) == 3 for key in counters)
    assert {module["name"]: module["changed"] for module in report.modules}[counters[0]] == 1
    unmerge(tmp_path / "merged", tmp_path / "back", base=tmp_path / "base", adapters=[tmp_path / "adapter"])
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(tmp_path / "base")
    with pytest.raises(UnsupportedError, match="num_batches_tracked"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "half", weights=0.5)
    key = f"base_model.model.{counters[0]}"
    factors = models.factors_of(tmp_path / "adapter")
    other = models.write_adapter(
        tmp_path / "other", factors | {key: factors[key].int()}, models.config_of(tmp_path / "adapter")
    )
    with pytest.raises(MismatchError, match="I32"):
        merge(tmp_path / "base", [other], tmp_path / "wrong")


def test_the_plan_bounds_a_kernel_by_its_matrix(tmp_path):
    """The memory of one kernel is that of its (out, in·k·…) matrix, and no output is larger than planned."""
    base = hand_made("unet")
    written(tmp_path, base)
    plan = plan_extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    unit = next(unit for unit in plan.units if unit.target == "up.resnet.conv1")
    assert unit.write_bytes == 4 * (2 * (16 + 28 * 9) + 16)
    assert unit.peak_bytes >= 4 * 16 * 28 * 9
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    stored = sum(tensor.nbytes for tensor in models.factors_of(tmp_path / "adapter").values())
    assert stored <= sum(unit.write_bytes for unit in plan.units)
