"""The rims of PEFT's LoRA: what its forms do to each other, to names that contain names, to zero and NaN."""

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file

import loratools as lt
from loratools.adapters import Adapter, LowRank
from loratools.adapters.block_diagonal import BlockDiagonal
from loratools.errors import InputDataError, MismatchError, NonFiniteError, UnsupportedError
from loratools.tensors import in_memory
from tests import models
from tests.interop.judge import load_cleanly
from tests.interop.kinds import Case, Net, config, require_rounded, rewrite, set_base
from tests.tiny import normal


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 1, 1), (1, 1, 3), (3, 1, 1), (2,), (1,)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels(tmp_path, kernel, dtype):
    """W + s·B·A for every kernel; where PEFT's merge crashes (three axes of which the first two are 1) as elsewhere."""
    layer = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[len(kernel)]

    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = layer(6, 10, kernel)

    case = Case(tmp_path, config(["conv"]), dtype=dtype, net=Convolution)
    wrapped = case.model.base_model.model.conv
    A, B = (getattr(wrapped, name)["default"].weight.double().flatten(1).detach() for name in ("lora_A", "lora_B"))
    before = case.before["conv.weight"]
    exact = before.double() + 7 / 4 * (B @ A).reshape(before.shape)
    merged = case.merged()["conv.weight"]
    require_rounded(merged, exact, before, ulps=0.501)
    crashes = len(kernel) == 3 and kernel[:2] == (1, 1)
    if crashes:
        with pytest.raises((RuntimeError, IndexError)):
            case.by_peft()
    else:
        torch.testing.assert_close(case.by_peft()["conv.weight"], merged, rtol=1e-5 if dtype == "fp32" else 1e-2,
                                   atol=1e-5 if dtype == "fp32" else 2e-2)  # fmt: skip
    case.require_way_back()
    case.require_written_back()


def test_a_kernel_of_another_form_is_refused(tmp_path):
    """(3, 2) and (2, 3) have as many entries: the adapter of one is none of the other."""
    case = Case(tmp_path, config(["conv2"]))
    weight = case.before["conv2.weight"]
    set_base(case, "conv2.weight", weight.transpose(2, 3).contiguous())
    with pytest.raises(MismatchError, match="conv2"):
        case.merged()
    set_base(case, "conv2.weight", weight.reshape(10, 12, 3, 1).contiguous())
    with pytest.raises(MismatchError, match="conv2"):
        case.merged()


@pytest.mark.parametrize("name", ["block.q", "block.turned", "embed", "conv2"])
@pytest.mark.parametrize("magnitude", [0.0, 1.0])
def test_dora_of_a_zero_row(tmp_path, name, magnitude):
    """‖W + ΔW‖ = 0: PEFT writes NaN; it is an error that says which row, of what."""
    case = Case(tmp_path, config([name], use_dora=True))
    key = f"{name}.weight"
    weight = case.before[key].clone()
    (weight.T if name in {"block.turned", "embed"} else weight)[2] = 0
    set_base(case, key, weight)

    def change(tensors):
        for each in tensors:
            if each.endswith(("lora_B.weight", "lora_embedding_B")):
                tensors[each][2] = 0
            if "magnitude" in each:
                tensors[each].view(-1)[2] = magnitude
        return tensors

    rewrite(case, change)
    with pytest.raises(NonFiniteError, match=r"(?s)zero.*" + name):
        case.merged()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_B.bias"])
def test_nan_in_any_factor(tmp_path, part):
    """Named; nothing is written."""
    options = {"use_dora": True} if "magnitude" in part else {"lora_bias": True} if "bias" in part else {}
    case = Case(tmp_path, config(["block.q"], **options))

    def change(tensors):
        tensors[f"base_model.model.block.q.{part}"].view(-1)[0] = torch.nan
        return tensors

    rewrite(case, change)
    with pytest.raises(NonFiniteError, match=part.replace(".", r"\.")):
        case.merged()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("field", "setting"), [
    ("velora_config", VeloraConfig()), ("monteclora_config", MontecloraConfig()),
])  # fmt: skip
def test_variants_with_tensors_of_their_own(tmp_path, field, setting):
    """VeLoRA and MonteCLoRA store more than factors: refused by name, not taken for parameters of the module."""
    case = Case(tmp_path, config(["block.q"], **{field: setting}))
    assert len(load_file(case.adapter / "adapter_model.safetensors")) > 2
    with pytest.raises(UnsupportedError, match=r"(?i)" + field.removesuffix("_config")):
        _ = case.loaded


@pytest.mark.parametrize(("field", "value", "name"), [
    ("layer_replication", [[0, 1], [0, 1]], "replication"), ("arrow_config", {"top_k": 1}, "Arrow"),
    ("alora_invocation_tokens", [1, 2], "activated"), ("kasa_config", {"beta": 1}, "KaSA"),
    ("init_lora_weights", "pissa", "pissa"), ("init_lora_weights", "pissa_niter_4", "pissa"),
    ("init_lora_weights", "olora", "olora"), ("init_lora_weights", "corda", "corda"),
    ("init_lora_weights", "lora_ga", "lora_ga"), ("init_lora_weights", "loftq", "loftq"),
])  # fmt: skip
def test_what_is_no_adapter_of_this_base(tmp_path, field, value, name):
    """Refused by name, with the field."""
    case = Case(tmp_path, config(["block.q"]))
    (case.adapter / "adapter_config.json").write_text(json.dumps(case.config | {field: value}))
    with pytest.raises(UnsupportedError, match=f"(?s){name}.*{field}"):
        _ = case.loaded


@pytest.mark.parametrize("value", ["gaussian", "eva", "orthogonal", "mica", True, False])
def test_initialisations_that_leave_the_base(tmp_path, value):
    """Accepted."""
    case = Case(tmp_path, config(["block.q"]))
    (case.adapter / "adapter_config.json").write_text(json.dumps(case.config | {"init_lora_weights": value}))
    assert isinstance(case.loaded["block.q"], LowRank)


def test_an_attention_and_its_projection_targeted_apart(tmp_path):
    """PEFT then has two updates of out_proj, of which its forward uses neither as it is: refused, none is dropped."""
    case = Case(tmp_path, config(["attn", "out_proj"]))
    with pytest.raises(InputDataError, match="out_proj"):
        _ = case.loaded


def test_lora_bias_of_an_attention(tmp_path):
    """PEFT ignores the bias of the packed projection in its forward and its merge: refused by name."""
    case = Case(tmp_path, config(["attn"], lora_bias=True))
    with pytest.raises(UnsupportedError, match=r"bias.*attn"):
        _ = case.loaded


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_around_an_attention(tmp_path, bias):
    """PEFT saves out_proj's bias and not in_proj_bias; merged, taken out and written back."""
    case = Case(tmp_path, config(["attn", "block.q"], bias=bias))
    merged, theirs = case.merged(), case.by_peft()
    for key in case.before:
        if key.endswith("bias") and key != "attn.in_proj_bias":
            assert torch.equal(merged[key], theirs[key]), key
    case.require_way_back()
    case.require_written_back()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_attention_in_every_dtype(tmp_path, dtype, rslora):
    """Rank and alpha by a pattern on the attention hold for both projections."""
    options = {"use_rslora": rslora, "rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 5}}
    case = Case(tmp_path, config(["attn", "block.q"], **options), dtype=dtype)
    merged, scaling = case.merged(), 5 / (3**0.5 if rslora else 3)
    layer = case.model.base_model.model.attn
    for key, wrapper in (("attn.in_proj_weight", layer), ("attn.out_proj.weight", layer.base_layer.out_proj)):
        A, B = (getattr(wrapper, name)["default"].weight.double().detach() for name in ("lora_A", "lora_B"))
        require_rounded(merged[key], case.before[key].double() + scaling * (B @ A), case.before[key], ulps=0.501)
    case.require_way_back()
    case.require_written_back()


def test_pefts_forward_of_an_attention(tmp_path):
    """Its own forward is that of the doubled out_proj: what `rescale --include '*.out_proj' --by 2` merges."""
    case = Case(tmp_path, config(["attn"]))
    lt.rescale(case.adapter, tmp_path / "doubled", by=2.0, include=["*.out_proj"])
    x = normal(4, 5, 1, 12)
    with torch.no_grad():
        theirs = case.model.base_model.model.attn(x, x, x)[0]
        for name, adapter in (("once", case.adapter), ("twice", tmp_path / "doubled")):
            lt.merge(case.base, [adapter], tmp_path / name)
            net = Net()
            net.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
            same = torch.allclose(net.attn(x, x, x)[0], theirs, rtol=1e-4, atol=1e-4)
            assert same == (name == "twice")


def blocks(seed, side, m=8, n=12, rank=4):
    small = (rank, n // 2) if side == "A" else (rank, n)
    high = (m, rank) if side == "A" else (m, rank // 2)
    return BlockDiagonal(lora_A=in_memory("A", normal(seed, *small)), lora_B=in_memory("B", normal(seed + 1, *high)),
                         alpha=7.0, blocks=2, compact=side)  # fmt: skip


def test_blocks_whose_names_contain_each_other(tmp_path):
    """PEFT looks for a name anywhere in a path: what that would make of a neighbour is refused, not written."""
    good = Adapter({"a.q": blocks(1, "A"), "a.k": blocks(3, "B")})
    lt.save(good, tmp_path / "good")
    back = lt.load_adapter(tmp_path / "good")
    assert {path: update.compact for path, update in back.items()} == {"a.q": "A", "a.k": "B"}
    plain = LowRank(lora_A=in_memory("A", normal(5, 4, 12)), lora_B=in_memory("B", normal(6, 8, 4)), alpha=7.0)
    for other in (blocks(3, "B"), plain):
        with pytest.raises(UnsupportedError, match=r"a\.q"):
            lt.save(Adapter({"a.q": blocks(1, "A"), "a.q_norm": other}), tmp_path / "bad")


def test_blocks_beside_plain_modules(tmp_path):
    """`match_strict` off: the others are plain LoRA, and stay so."""
    setting = BdLoraConfig(target_modules_bd_a=["block.q"], nblocks=2, match_strict=False)
    case = Case(tmp_path, config(["block.q", "block.k"], use_bdlora=setting))
    assert {path: update.kind for path, update in case.loaded.items()} == {
        "block.q": "block-diagonal",
        "block.k": "low-rank",
    }
    case.require_written_back()


def test_a_sum_of_compact_forms_is_lora(tmp_path):
    """Stacked with plain LoRA, blocks are multiplied out: float32 factors, no flag left, PEFT loads it."""
    setting = BdLoraConfig(target_modules_bd_a=["block.q"], target_modules_bd_b=["block.k"], nblocks=2)
    case = Case(tmp_path / "blocks", config(["block.q", "block.k"], use_bdlora=setting))
    plain = Case(tmp_path / "plain", config(["block.q", "block.k"], use_rslora=True))
    lt.stack([case.adapter, plain.adapter], tmp_path / "both", weights=[0.5, -1.5])
    found = lt.load_adapter(tmp_path / "both")
    for path in ("block.q", "block.k"):
        exact = 0.5 * case.loaded[path].delta_weight() - 1.5 * plain.loaded[path].delta_weight()
        torch.testing.assert_close(found[path].delta_weight(), exact, rtol=1e-5, atol=1e-6)
        assert {ref.dtype for ref in found[path].factors} == {"F32"}
    model = load_cleanly(copy.deepcopy(case.net), tmp_path / "both")
    torch.testing.assert_close(
        model.base_model.model.block.q.get_delta_weight("default"),
        found["block.q"].delta_weight(),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("verb", ["by", "bake", "restate"])
def test_rescaled_compact_forms(tmp_path, verb):
    """`--by` keeps the factors; what restates the alpha is exact or refused by name."""
    setting = BdLoraConfig(target_modules_bd_a=["block.q"], nblocks=2, match_strict=False)
    case = Case(tmp_path, config(["block.q"], use_bdlora=setting))
    options = {"by": {"by": -3.0}, "bake": {"bake": True}, "restate": {"restate_alpha": 3.0}}[verb]
    try:
        lt.rescale(case.adapter, tmp_path / "out", **options)
    except UnsupportedError as error:
        assert verb != "by"
        assert "block-diagonal" in str(error)  # noqa: PT017
        return
    found = lt.load_adapter(tmp_path / "out")["block.q"].delta_weight()
    factor = -3.0 if verb == "by" else 1.0
    torch.testing.assert_close(found, factor * case.loaded["block.q"].delta_weight(), rtol=1e-5, atol=1e-6)


def test_a_flag_that_peft_ignored(tmp_path):
    """`use_qalora` on a Linear that is no GPTQ layer does nothing in PEFT: the mismatch says so."""
    case = Case(tmp_path, config(["block.q"], use_qalora=True, qalora_group_size=4))
    with pytest.raises(MismatchError, match=r"(?s)qalora"):
        case.merged()


REPLACED = {"dora": {"use_dora": True}, "ia3": None}


@pytest.mark.parametrize("kind", REPLACED)
def test_each_adapter_acts_on_what_it_knows(tmp_path, kind):
    """An adapter that replaces a weight and acts on it acts on its own replacement, whatever weights and others are:
    W + Σ w (W'_i − W), each W'_i as if it were alone."""
    setting = config(["block.q"], use_dora=True) if kind == "dora" else IA3Config(
        target_modules=["block.q"], feedforward_modules=[])  # fmt: skip
    case = Case(tmp_path / "one", setting)
    given = normal(5, 18, 12)
    rewrite(case, lambda tensors: tensors | {"base_model.model.block.q.base_layer.weight": given})
    other = Case(tmp_path / "two", setting, seed=3)
    rewrite(other, lambda tensors: {key: value * 1.5 for key, value in tensors.items()})
    key = "block.q.weight"
    before = case.before[key].double()
    alone = case.merged()[key].double() - before
    half = case.merged(weights=[0.5], name="half")[key].double()
    torch.testing.assert_close(half, before + 0.5 * alone, rtol=0, atol=1e-5)
    lt.merge(case.base, [other.adapter], tmp_path / "second")
    second = load_file(tmp_path / "second" / "model.safetensors")[key].double() - before
    both = case.merged(other.adapter, weights=[0.5, 2], name="both")[key].double()
    torch.testing.assert_close(both, before + 0.5 * alone + 2 * second, rtol=0, atol=1e-5)


EVERY = {
    "low-rank": {"target_modules": ["block.q", "block.turned", "embed", "conv2"]},
    "dora": {"target_modules": ["block.q", "block.turned", "embed", "conv2"], "use_dora": True},
    "lora-bias": {"target_modules": ["block.q", "conv2"], "lora_bias": True},
    "biases": {"target_modules": ["block.q", "conv2"], "bias": "all"},
    "tokens": {"target_modules": ["block.q"], "trainable_token_indices": {"embed": [3, 0]}},
    "attention": {"target_modules": ["attn"]},
    "blocks": {"target_modules": ["block.q"], "use_bdlora": BdLoraConfig(target_modules_bd_a=["block.q"], nblocks=2)},
}


@pytest.mark.parametrize("name", EVERY)
def test_inspected(tmp_path, name):
    """Kind, shape, rank and scaling of every module, and as many parameters as the file has."""
    case = Case(tmp_path, LoraConfig(r=4, lora_alpha=7, **EVERY[name]))
    report = lt.inspect(case.adapter).to_json()
    stored = load_file(case.adapter / "adapter_model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert not any("no tensor" in note for note in report["notes"]), report["notes"]
    rows_ = {row["name"]: row for row in report["modules"]}
    assert rows_.keys() == case.loaded.keys()
    for row in rows_.values():
        if row["kind"] not in {"rows", "full"}:
            assert (row["rank"], row["alpha"], row["scaling"]) == (4, 7, 7 / 4), row
            key = row["name"] if row["name"].endswith("_weight") else f"{row['name']}.weight"
            stored_as = list(case.before[key].shape)
            turned = row["name"] in {"block.turned", "embed"}  # whose B·A is the transpose of what is stored
            assert row["shape"] == (stored_as[::-1] if turned else stored_as), row


@pytest.mark.parametrize("name", EVERY)
def test_written_twice(tmp_path, name):
    """decode(encode(x)) = x: the second writing is the first, byte for byte."""
    case = Case(tmp_path, LoraConfig(r=4, lora_alpha=7, **EVERY[name]))
    lt.save(case.loaded, tmp_path / "once")
    lt.save(lt.load_adapter(tmp_path / "once"), tmp_path / "twice")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


@pytest.mark.parametrize("name", ["dora", "lora-bias", "tokens", "blocks"])
def test_flags_follow_the_modules(tmp_path, name):
    """What is left without the modules of a kind says nothing of that kind any more, and PEFT loads it."""
    kind = Case(tmp_path / "kind", LoraConfig(r=4, lora_alpha=7, **EVERY[name]))
    plain = Case(tmp_path / "plain", config(["block.k"]))
    left = Adapter(dict(plain.loaded), config=kind.config | {"fan_in_fan_out": False})
    lt.save(left, tmp_path / "left")
    written = models.config_of(tmp_path / "left")
    for field in ("use_dora", "lora_bias", "trainable_token_indices", "use_bdlora"):
        assert not written.get(field), field
    load_cleanly(copy.deepcopy(plain.net), tmp_path / "left")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dora_on_an_embedding_that_is_saved_too(tmp_path, dtype):
    """`base_layer.weight` in the file is the W that the norm is taken over."""
    case = Case(tmp_path, config(["embed"], use_dora=True), dtype=dtype)
    own = normal(9, 23, 12, dtype=case.before["embed.weight"].dtype)
    rewrite(case, lambda tensors: {**tensors, "base_model.model.embed.base_layer.weight": own})
    layer = case.model.base_model.model.embed
    A, B = (getattr(layer, part)["default"].double().detach() for part in ("lora_embedding_A", "lora_embedding_B"))
    moved = own.double() + 7 / 4 * (B @ A).T
    exact = moved * (layer.lora_magnitude_vector["default"].weight.double().detach() / moved.norm(dim=0))
    require_rounded(case.merged()["embed.weight"], exact, own, ulps=0.51)
    case.require_way_back()


def test_two_doras(tmp_path):
    """Each changes the base as it is: W + (W'₁ − W) + (W'₂ − W), in either order."""
    cases = [Case(tmp_path / str(size), config(["block.q", "block.turned"], use_dora=True), size=size)
             for size in (0.2, 0.5)]  # fmt: skip
    found = cases[0].merged(cases[1].adapter)
    for name, dim in (("block.q", 1), ("block.turned", 0)):
        before = cases[0].before[f"{name}.weight"]
        exact = before.double().clone()
        for case in cases:
            layer = case.model.get_submodule(f"base_model.model.{name}")
            product = 7 / 4 * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double())
            moved = before.double() + (product if dim else product.T)
            magnitude = layer.lora_magnitude_vector["default"].weight.double()
            exact += moved * (magnitude / moved.norm(dim=dim)).unsqueeze(dim) - before.double()
        require_rounded(found[f"{name}.weight"], exact.detach(), before, ulps=0.51)
