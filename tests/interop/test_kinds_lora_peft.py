"""Every kind of layer and every variant of PEFT's LoRA: written by PEFT, read, merged, taken out, written back."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import MalformedError, MismatchError, UnsupportedError
from tests.interop.kinds import Case, Net, require_rounded

LAYERS = ["block.q", "block.k", "block.turned", "embed", "conv1", "conv2", "point", "conv3"]
MIXED = ("fan_in_fan_out",)
"""What PEFT says of any adapter that has both Linear and Conv1D layers: the flag is one for all."""
ODD = {"rank_pattern": {"block.k": 5, "conv2": 2}, "alpha_pattern": {"embed": 3, "block.turned": 11}}


def config(targets=LAYERS, **options):
    """Alpha differs from r, ranks and alphas differ between modules."""
    return LoraConfig(**{"target_modules": list(targets), "r": 4, "lora_alpha": 7, **ODD, **options})


def factors(case, name):
    """A, B as PEFT holds them, float64; an embedding's and a convolution's as matrices."""
    layer = case.model.get_submodule(f"base_model.model.{name}")
    if len(layer.lora_embedding_A):
        return layer.lora_embedding_A["default"].double(), layer.lora_embedding_B["default"].double()
    return layer.lora_A["default"].weight.double().flatten(1), layer.lora_B["default"].weight.double().flatten(1)


def delta(case, name, stored):
    """s · B A in float64, the way round that the base stores it."""
    layer = case.model.get_submodule(f"base_model.model.{name}")
    A, B = factors(case, name)
    product = layer.scaling["default"] * (B @ A)
    turned = name in {"block.turned", "embed"}
    return (product.T if turned else product).reshape(stored.shape)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_layers(tmp_path, dtype, rslora):
    """Linear, HF Conv1D, Embedding, Conv1d, Conv2d (1×1 too), Conv3d: W + s·B·A rounded once, and every byte back."""
    case = Case(tmp_path, config(use_rslora=rslora), dtype=dtype)
    merged = case.merged()
    for name in LAYERS:
        key = f"{name}.weight"
        exact = case.before[key].double() + delta(case, name, case.before[key])
        require_rounded(merged[key], exact, case.before[key], ulps=0.501)
    case.require_way_back()
    case.require_written_back(expected=MIXED)


def test_layers_agree_with_pefts_own_delta(tmp_path):
    """`get_delta_weight` where PEFT has one; a Conv3d kernel of (1, 1, k) crashes there, and the formula stands."""
    case = Case(tmp_path, config())
    for name, update in case.loaded.items():
        layer = case.model.get_submodule(f"base_model.model.{name}")
        ours = update.delta_weight()
        if name == "conv3":
            with pytest.raises((RuntimeError, IndexError)):
                layer.get_delta_weight("default")
            continue
        theirs = layer.get_delta_weight("default").detach()
        theirs = theirs.T if name in {"block.turned", "embed"} else theirs.flatten(1)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_merge_agrees_with_pefts(tmp_path):
    """Within PEFT's own float32 rounding."""
    case = Case(tmp_path, config([each for each in LAYERS if each != "conv3"]))
    merged, theirs = case.merged(), case.by_peft()
    for key, tensor in theirs.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-5)


def test_grouped_convolutions_are_refused(tmp_path):
    """lora_A mixes the groups: there is no ΔW of the base's shape, and PEFT refuses the merge too."""

    class Grouped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 12, 3, groups=2)

    case = Case(tmp_path, LoraConfig(target_modules=["conv"], r=4, lora_alpha=7), net=Grouped)
    with pytest.raises(UnsupportedError, match=r"2 groups.*conv"):
        _ = case.loaded


DORA = ["block.q", "block.k", "block.turned", "embed", "conv1", "conv2", "point"]


def dora(case, name, base=None):
    """m / ‖W + ΔW‖ · (W + ΔW) in float64, stored as the base's."""
    key = f"{name}.weight"
    stored = (case.before if base is None else base)[key].double()
    moved = stored + delta(case, name, stored)
    layer = case.model.get_submodule(f"base_model.model.{name}")
    magnitude = layer.lora_magnitude_vector["default"].weight.double().flatten()
    if name in {"block.turned", "embed"}:
        return moved * (magnitude / moved.norm(dim=0))
    shape = (-1, *(1 for _ in stored.shape[1:]))
    return moved * (magnitude / moved.flatten(1).norm(dim=1)).view(shape)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dora(tmp_path, dtype):
    """W' = m / ‖W + ΔW‖ · (W + ΔW), rounded once; columns of a Conv1D and of an embedding too; every byte back."""
    case = Case(tmp_path, config(DORA, use_dora=True), dtype=dtype)
    merged = case.merged()
    for name in DORA:
        exact = dora(case, name).detach()
        require_rounded(merged[f"{name}.weight"], exact, case.before[f"{name}.weight"], ulps=0.51)
    case.require_way_back()
    case.require_written_back(expected=MIXED)
    if dtype == "fp32":
        for key, tensor in case.by_peft().items():
            torch.testing.assert_close(merged[key], tensor, rtol=2e-5, atol=2e-5)


def test_dora_by_weight_and_beside_another(tmp_path):
    """A weight multiplies W' − W, and every change is one of the base."""
    case = Case(tmp_path / "dora", config(DORA, use_dora=True))
    plain = Case(tmp_path / "plain", config(DORA))
    found = case.merged(plain.adapter, weights=[0.5, -2.0])
    for name in DORA:
        before = case.before[f"{name}.weight"]
        exact = before.double() + 0.5 * (dora(case, name) - before.double()) - 2 * delta(plain, name, before)
        require_rounded(found[f"{name}.weight"], exact.detach(), before, ulps=0.51)


def test_dora_has_no_delta_of_its_own(tmp_path):
    """It depends on the base: given one it is W' − W; sums, scalings and subtraction are refused by name."""
    case = Case(tmp_path, config(["block.q"], use_dora=True))
    update = case.loaded["block.q"]
    base = case.before["block.q.weight"]
    torch.testing.assert_close(update.delta_weight(base), (dora(case, "block.q") - base.double()).float().detach())
    with pytest.raises(UnsupportedError, match="base"):
        update.delta_weight()
    for work in (
        lambda: lt.stack([case.adapter, case.adapter], tmp_path / "x"),
        lambda: lt.rescale(case.adapter, tmp_path / "x", by=0.5),
    ):
        with pytest.raises(UnsupportedError, match=r"dora.*base"):
            work()
    lt.merge(case.base, [case.adapter], tmp_path / "bare", receipt="none")
    with pytest.raises(UnsupportedError, match="--base"):
        lt.unmerge(tmp_path / "bare", tmp_path / "x", adapters=[case.adapter])


def test_dora_magnitudes_under_their_old_key(tmp_path):
    """PEFT before 0.12 wrote `.weight` behind it."""
    case = Case(tmp_path, config(["block.q"], use_dora=True))
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    old = {f"{key}.weight" if key.endswith("magnitude_vector") else key: each for key, each in tensors.items()}
    before = case.merged(name="new")
    save_file(old, file, metadata={"format": "pt"})
    assert torch.equal(case.merged(name="old")["block.q.weight"], before["block.q.weight"])
    del old["base_model.model.block.q.lora_magnitude_vector.weight"]
    save_file(old, file, metadata={"format": "pt"})
    with pytest.raises(MalformedError, match=r"magnitude.*block\.q"):
        _ = case.loaded


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_lora_bias(tmp_path, dtype):
    """b' = b + s · bias_B; stacked and rescaled with the factors."""
    case = Case(tmp_path, config(["block.q"], lora_bias=True, alpha_pattern={}, rank_pattern={}), dtype=dtype)
    bias = case.model.base_model.model.block.q.lora_B["default"].bias.double().detach()
    merged, before = case.merged(), case.before["block.q.bias"]
    require_rounded(merged["block.q.bias"], before.double() + 7 / 4 * bias, before, ulps=0.501)
    case.require_way_back()
    case.require_written_back()
    lt.rescale(case.adapter, tmp_path / "half", by=0.5)
    lt.rescale(case.adapter, tmp_path / "baked", bake=True)
    lt.stack([case.adapter, tmp_path / "half"], tmp_path / "both", weights=[1.0, -3.0])
    for made, factor in (("half", 0.5), ("baked", 1.0), ("both", -0.5)):
        update = lt.load_adapter(tmp_path / made)["block.q"]
        offset = update.offsets["bias"]
        found = offset.vector.load().double() * offset.scale
        torch.testing.assert_close(found, factor * 7 / 4 * bias, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(update.delta_weight(), factor * case.loaded["block.q"].delta_weight())


def test_lora_bias_needs_a_bias(tmp_path):
    """PEFT cannot merge it into a layer without one, and neither can we."""
    case = Case(tmp_path, config(["block.q"], lora_bias=True))
    tensors = {key: each for key, each in case.before.items() if key != "block.q.bias"}
    save_file(tensors, case.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"bias.*block\.q"):
        case.merged()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(tmp_path, bias):
    """Whole biases, of the wrapped layers or of all."""
    case = Case(tmp_path, config(["block.q", "conv2"], bias=bias))
    merged, theirs = case.merged(), case.by_peft()
    changed = {key for key, tensor in case.before.items() if not torch.equal(tensor, merged[key])}
    assert {key for key in changed if key.endswith("bias")} == {
        key for key, tensor in theirs.items() if key.endswith("bias") and not torch.equal(tensor, case.before[key])
    }
    for key in changed:
        torch.testing.assert_close(merged[key], theirs[key], rtol=1e-5, atol=1e-5)
    case.require_way_back()
    case.require_written_back()
    assert json.loads((tmp_path / "written" / "adapter_config.json").read_text())["bias"] == bias


def test_trained_tokens_beside_lora(tmp_path):
    """Rows given whole, at the indices that the configuration lists; a weight moves them part of the way."""
    case = Case(tmp_path, config(["block.q"], trainable_token_indices={"embed": [3, 0, 22]}))
    rows = case.model.base_model.model.embed.token_adapter.trainable_tokens_delta["default"].detach()
    merged = case.merged()
    expected = case.before["embed.weight"].clone()
    expected[[3, 0, 22]] = rows
    assert torch.equal(merged["embed.weight"], expected)
    half = case.merged(weights=0.5, name="half")["embed.weight"]
    middle = (case.before["embed.weight"][[3, 0, 22]].double() + rows.double()) / 2
    require_rounded(half[[3, 0, 22]], middle, rows, ulps=0.501)
    case.require_way_back()
    case.require_written_back()


def test_trained_tokens_alone(tmp_path):
    """The type TRAINABLE_TOKENS, which stays what it is when it is written."""
    case = Case(tmp_path, TrainableTokensConfig(target_modules=["embed"], token_indices=[5, 1]))
    merged = case.merged()
    assert torch.equal(merged["embed.weight"], case.by_peft()["embed.weight"])
    assert (merged["embed.weight"] != case.before["embed.weight"]).any(dim=1).nonzero().flatten().tolist() == [1, 5]
    case.require_way_back()
    case.require_written_back()
    assert json.loads((tmp_path / "written" / "adapter_config.json").read_text())["peft_type"] == "TRAINABLE_TOKENS"


@pytest.mark.parametrize("indices", [None, [1], [1, 1], [1, "2"], [1, -2], [1, 99]])
def test_trained_tokens_that_do_not_fit(tmp_path, indices):
    """A list that is missing, too short, doubled, or beyond the vocabulary: nothing is written."""
    case = Case(tmp_path, TrainableTokensConfig(target_modules=["embed"], token_indices=[5, 1]))
    file = case.adapter / "adapter_config.json"
    file.write_text(json.dumps(case.config | {"token_indices": indices}))
    with pytest.raises((MalformedError, MismatchError)):
        case.merged()
    assert not (tmp_path / "merged").exists()


def test_attention(tmp_path):
    """The packed projection is a parameter; out_proj is added once, as the formula says, where PEFT adds it twice."""
    case = Case(tmp_path, config(["attn"]))
    assert set(case.loaded) == {"attn.in_proj_weight", "attn.out_proj"}
    assert any("twice" in note and "--by 2" in note for note in case.loaded.notes)
    merged, theirs = case.merged(), case.by_peft()
    layer = case.model.base_model.model.attn
    for key, wrapper in (("attn.in_proj_weight", layer), ("attn.out_proj.weight", layer.base_layer.out_proj)):
        A, B = (getattr(wrapper, name)["default"].weight.double().detach() for name in ("lora_A", "lora_B"))
        exact = case.before[key].double() + 7 / 4 * (B @ A)
        require_rounded(merged[key], exact, case.before[key], ulps=0.501)
        times = 2 if "out_proj" in key else 1
        doubled = case.before[key].double() + times * 7 / 4 * (B @ A)
        torch.testing.assert_close(theirs[key].double(), doubled, rtol=1e-5, atol=1e-5)
    case.require_way_back()
    case.require_written_back()
    lt.rescale(case.adapter, tmp_path / "doubled", by=2.0, include=["*.out_proj"])
    lt.merge(case.base, [tmp_path / "doubled"], tmp_path / "as-peft")
    as_peft = load_file(tmp_path / "as-peft" / "model.safetensors")
    for key in ("attn.in_proj_weight", "attn.out_proj.weight"):
        torch.testing.assert_close(as_peft[key], theirs[key], rtol=1e-5, atol=1e-5)


def test_an_attention_is_written_whole_or_not(tmp_path):
    """PEFT has one rank and one alpha for both projections, and no in_proj without its out_proj."""
    case = Case(tmp_path, config(["attn"]))
    with pytest.raises(UnsupportedError, match="out_proj"):
        lt.stack([case.adapter], tmp_path / "x", exclude=["*.out_proj"])


def test_grouped_inputs(tmp_path):
    """QALoRA: PEFT trains it on GPTQ layers only, and does not merge it; its forward is the judge."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    case = Case(tmp_path, config(["block.q"], rank_pattern={}, alpha_pattern={}))
    file = case.adapter / "adapter_model.safetensors"
    key = "base_model.model.block.q.lora_A.weight"
    tensors = load_file(file)
    tensors[key] = tensors[key][:, :4].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    settings = case.config | {"use_qalora": True, "qalora_group_size": 3}
    (case.adapter / "adapter_config.json").write_text(json.dumps(settings))
    layer = copy.deepcopy(case.model.base_model.model.block.q)
    layer.lora_A["default"].weight.data, layer.qalora_group_size = tensors[key], {"default": 3}
    x = torch.eye(12)
    with torch.no_grad():
        theirs = QALoraLinearVariant.forward(layer, "default", x, torch.zeros(12, 18)).T
    torch.testing.assert_close(case.loaded["block.q"].delta_weight(), theirs, rtol=1e-5, atol=1e-5)
    means = torch.zeros(4, 12, dtype=torch.float64)
    for group in range(4):
        means[group, 3 * group : 3 * group + 3] = 4 / 3
    lora_B = tensors["base_model.model.block.q.lora_B.weight"].double()
    before = case.before["block.q.weight"]
    exact = before.double() + 7 / 4 * (lora_B @ tensors[key].double() @ means)
    require_rounded(case.merged()["block.q.weight"], exact, before, ulps=0.501)
    case.require_way_back()
    lt.save(case.loaded, tmp_path / "written")
    assert torch.equal(load_file(tmp_path / "written" / "adapter_model.safetensors")[key], tensors[key])
    written = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert (written["use_qalora"], written["qalora_group_size"]) == (True, 3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocks(tmp_path, dtype):
    """BD-LoRA: a block-diagonal A or B, stored without its zeros."""
    setting = BdLoraConfig(target_modules_bd_a=["block.q"], target_modules_bd_b=["block.k"], nblocks=2)
    case = Case(tmp_path, config(["block.q", "block.k"], rank_pattern={}, use_bdlora=setting), dtype=dtype)
    assert {update.kind for update in case.loaded.values()} == {"block-diagonal"}
    merged = case.merged()
    for name in ("block.q", "block.k"):
        layer = case.model.get_submodule(f"base_model.model.{name}")
        whole = [getattr(each["default"], "weight_as_blockdiagonal_matrix", lambda each=each: each["default"].weight)()
                 for each in (layer.lora_A, layer.lora_B)]  # fmt: skip
        exact = case.before[f"{name}.weight"].double() + 7 / 4 * (whole[1].double() @ whole[0].double()).detach()
        require_rounded(merged[f"{name}.weight"], exact, case.before[f"{name}.weight"], ulps=0.501)
    case.require_way_back()
    case.require_written_back()


def test_settings_that_are_one_for_all_modules(tmp_path):
    """A mixture that PEFT's configuration cannot say is refused, with both modules."""
    one = Case(tmp_path / "one", config(["block.q"], use_dora=True))
    two = Case(tmp_path / "two", config(["block.k"]))
    with pytest.raises(UnsupportedError, match=r"use_dora"):
        lt.stack([one.adapter, two.adapter], tmp_path / "x")


def test_names_in_patterns_do_not_leak(tmp_path):
    """Ranks and alphas by pattern, through a conversion of our own."""
    case = Case(tmp_path, config())
    case.require_written_back(expected=MIXED)
    written = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {"block.k": 5, "conv2": 2}
    assert written["alpha_pattern"] == {"block.turned": 11, "embed": 3}
    assert math.isclose(case.loaded["block.k"].scaling, 7 / 5)


def test_the_net_has_every_layer():
    """The list above is what the net has."""
    assert {name for name, each in Net().named_modules() if hasattr(each, "weight")} >= set(LAYERS)
