"""What mergekit-extract-lora 0.1.5 gets wrong, letter by letter as in the survey: a test each that we pass.

Fused experts (b) and convolutions (h) too.
"""

import os

import pytest
import torch

from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from tests import models
from tests.interop.extraction import assert_same_output, delta_of, make_pair, stored_products
from tests.interop.judge import load_cleanly, saved_modules, wrapped_modules


def test_a_changed_biases_of_low_rank_modules_are_loaded(tmp_path):
    """(a) mergekit stores bias deltas that PEFT drops in silence; ours arrive: every q/k/v bias of Qwen2 is the tuned
    one under PEFT, bit for bit."""
    pair = make_pair(tmp_path, "qwen")
    extract(pair.base, pair.tuned, tmp_path / "adapter", rank=128)
    model = load_cleanly(pair.fresh(), tmp_path / "adapter")
    for name, module in pair.model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            found = model.get_base_model().get_submodule(name)
            assert torch.equal(found.get_base_layer().bias, module.bias)
    assert_same_output(model, pair.model)


@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"error": 0.2}, {"rank": 4}])
def test_c_untouched_modules_have_no_rank(tmp_path, rule):
    """(c) mergekit's adaptive rule gives an untouched module rank 0, which PEFT refuses to load; ours is not there."""
    pair = make_pair(tmp_path, "llama", only=lambda name: "layers.1" in name and name.endswith("proj.weight"))
    report = extract(pair.base, pair.tuned, tmp_path / "adapter", **rule)
    assert all("layers.1" in module["name"] and module["rank"] > 0 for module in report.modules)
    model = load_cleanly(pair.fresh(), tmp_path / "adapter")
    assert all("layers.1" in path for path in wrapped_modules(model))
    config = models.config_of(tmp_path / "adapter")
    assert all(rank > 0 for rank in config["rank_pattern"].values())


def test_d_excluded_modules_are_not_wrapped(tmp_path):
    """(d) mergekit's suffix targets match the excluded layer again, with random factors; ours are full paths."""
    pair = make_pair(tmp_path, "llama")
    extract(pair.base, pair.tuned, tmp_path / "adapter", rank=128, exclude=[r"re:layers\.0\."])
    model = load_cleanly(pair.fresh(), tmp_path / "adapter")
    wrapped = wrapped_modules(model)
    assert wrapped
    assert not any("layers.0." in path for path in wrapped | saved_modules(model))
    before = models.tensors_of(pair.base)
    for name, tensor in model.get_base_model().state_dict().items():
        if "layers.0." in name:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_e_added_tokens_load_on_the_real_base(tmp_path, family):
    """(e) with eight more tokens mergekit's adapter does not fit the real base; ours loads, and merges to the tuned."""
    base, tuned = models.build(family), models.build(family)
    with models.quiet():
        tuned.resize_token_embeddings(models.VOCABULARY + 8, mean_resizing=False)
    models.save(base, tmp_path / "base")
    models.save(models.disturbed(tuned, 0.02), tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=128)
    load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert_same_output(models.load(tmp_path / "merged"), tuned)


@pytest.mark.parametrize("family", sorted(models.TIED))
def test_f_tied_embeddings_are_changed_once(tmp_path, family):
    """(f) mergekit writes a tied matrix's ΔW for embedding and head, and the merge applies it twice (error 0.93);
    ours is the tuned matrix in PEFT's forward, in PEFT's merge and in our own."""
    pair = make_pair(tmp_path, family)
    extract(pair.base, pair.tuned, tmp_path / "adapter", rank=128)
    model = load_cleanly(pair.fresh(), tmp_path / "adapter")
    assert_same_output(model, pair.model)
    merge(pair.base, [tmp_path / "adapter"], tmp_path / "merged")
    assert_same_output(models.load(tmp_path / "merged"), pair.model)
    with models.quiet():
        theirs = model.merge_and_unload()
    tuned = pair.model.get_input_embeddings().weight
    assert torch.equal(theirs.get_input_embeddings().weight, tuned)
    assert torch.equal(theirs.get_output_embeddings().weight, tuned)


def test_g_conv1d_of_transformers_is_a_matrix(tmp_path):
    """(g) for GPT-2 mergekit ends in `max() arg is an empty sequence`; ours factors all of its Conv1D, square ones the
    right way round."""
    pair = make_pair(tmp_path, "gpt2")
    report = extract(pair.base, pair.tuned, tmp_path / "adapter", rank=128)
    names = {module["name"].split(".")[-1] for module in report.modules}
    assert names == {"c_attn", "c_proj", "c_fc", "wpe"}
    stored, base = stored_products(tmp_path / "adapter"), pair.fresh()
    for path, delta in stored.items():
        true = delta_of(path, base, pair.model)
        assert delta.shape == true.shape
        assert (delta - true).norm() < 1e-5 * true.norm()
    assert_same_output(load_cleanly(base, tmp_path / "adapter"), pair.model)


class Convolutions(torch.nn.Module):
    """What (h) is about: a sequence's convolution, plain and depthwise, and an image's patches."""

    def __init__(self):
        super().__init__()
        self.patches, self.plain = torch.nn.Conv2d(3, 8, (4, 2), stride=(4, 2)), torch.nn.Conv1d(8, 6, 3)
        self.depthwise, self.head = torch.nn.Conv1d(6, 6, 4, groups=6), torch.nn.Linear(6, 5)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        x = torch.relu(self.patches(x)).flatten(2)
        return self.head(self.depthwise(torch.relu(self.plain(x))).mean(-1))


def test_h_convolutions_are_kernels(tmp_path):
    """(h) mergekit factors nn.Conv1d into nonsense and crashes on nn.Conv2d; ours are PEFT's own shapes, kernel of A
    and 1 of B, and a depthwise one is whole: PEFT computes what the tuned network does, and so does our merge."""
    torch.manual_seed(0)
    base = Convolutions()
    tuned = models.tuned_from(base)
    for name, net in (("base", base), ("tuned", tuned)):
        models.write_checkpoint(tmp_path / name, net.state_dict(), net.config)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=64)
    assert {"depthwise.weight", "depthwise.bias"} <= set(report.whole)
    factors = models.factors_of(tmp_path / "adapter")
    shapes = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in factors.items()}
    assert shapes["patches.lora_A.weight"] == (8, 3, 4, 2)
    assert shapes["patches.lora_B.weight"] == (8, 8, 1, 1)
    assert shapes["plain.lora_A.weight"] == (6, 8, 3)
    fresh = Convolutions()
    fresh.load_state_dict(base.state_dict())
    model = load_cleanly(fresh, tmp_path / "adapter")
    assert wrapped_modules(model) == {"patches", "plain", "head"}
    assert saved_modules(model) == {"depthwise"}
    x = torch.randn(2, 3, 12, 8)
    assert (model(x) - tuned(x)).abs().max() <= 1e-5 * tuned(x).abs().max()
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    fresh = Convolutions()
    fresh.load_state_dict(models.tensors_of(tmp_path / "merged"))
    assert (fresh(x) - tuned(x)).abs().max() <= 1e-5 * tuned(x).abs().max()


def test_i_relative_paths_without_a_network(tmp_path, monkeypatch, no_network):
    """(i) mergekit asks the Hub about a relative path after all the work and dies offline; ours opens no connection."""
    make_pair(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    extract("base", "tuned", "adapter", rank=4)
    merge("base", ["adapter"], "merged")
    load_cleanly(models.load("base"), "adapter")
    for path in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert os.fspath(tmp_path / "merged" / "config.json")


class Mixer(torch.nn.Module):
    """The parameters of a state-space mixer that have names of their own, between two Linears."""

    def __init__(self, width=16, states=4):
        super().__init__()
        self.A_log = torch.nn.Parameter(torch.randn(width, states))
        self.D = torch.nn.Parameter(torch.randn(width))
        self.dt_bias = torch.nn.Parameter(torch.randn(width))
        self.in_proj = torch.nn.Linear(width, width, bias=False)
        self.out_proj = torch.nn.Linear(width, width)

    def forward(self, x):
        x = self.in_proj(x) + self.dt_bias
        return self.out_proj(x * torch.exp(self.A_log).sum(1) + x * self.D)


class Mamba(torch.nn.Module):
    """Two of them under one root that has a parameter itself."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Mixer(), Mixer()])
        self.gain = torch.nn.Parameter(torch.ones(16))
        self.config = {"model_type": "custom"}

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x * self.gain


def test_j_parameters_of_any_name_are_kept(tmp_path):
    """(j) mergekit never visits A_log, D, dt_bias or any nn.Parameter that is not called weight or bias; ours are in
    the file, PEFT sets them, our merge does too, and the report names each."""
    torch.manual_seed(0)
    base = Mamba()
    tuned = models.tuned_from(base)
    models.write_checkpoint(tmp_path / "base", base.state_dict(), base.config)
    models.write_checkpoint(tmp_path / "tuned", tuned.state_dict(), base.config)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=16)
    bare = {f"layers.{index}.{name}" for index in (0, 1) for name in ("A_log", "D", "dt_bias")} | {"gain"}
    assert bare <= set(report.whole)
    fresh = Mamba()
    fresh.load_state_dict(base.state_dict())
    model = load_cleanly(fresh, tmp_path / "adapter")
    for name in bare:
        assert torch.equal(model.get_base_model().get_parameter(name), tuned.get_parameter(name)), name
    x = torch.randn(5, 16)
    assert (model(x) - tuned(x)).abs().max() <= 1e-5 * tuned(x).abs().max()
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.tensors_of(tmp_path / "merged")
    assert all(torch.equal(merged[name], tuned.get_parameter(name)) for name in bare)
    left = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "low", rank=16, only_low_rank=True).left_out
    assert set(left) == bare | {"layers.0.out_proj.bias", "layers.1.out_proj.bias"}


def refusable(name):
    """(base, tuned) tensors in which, beside a Linear, one parameter of that name changed; and its config."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (4, 16, 32),
        "model.layers.0.mlp.experts.down_proj": (4, 16, 8),
        "model.layers.0.mixer.conv1d.weight": (16, 1, 4),
        "vision.patch_embed.proj.weight": (8, 3, 4, 4),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
    }
    base = {each: torch.randn(shape, generator=generator) for each, shape in shapes.items()}
    changed = (name, "model.layers.0.self_attn.q_proj.weight")
    tuned = {each: tensor + 0.01 if each in changed else tensor for each, tensor in base.items()}
    return base, tuned


CHANGED = {
    "model.layers.0.mlp.experts.gate_up_proj": "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.down_proj": "model.layers.0.mlp.experts.down_proj",
    "vision.patch_embed.proj.weight": "vision.patch_embed.proj",
}


@pytest.mark.parametrize("name", CHANGED)
def test_b_and_h_are_low_rank(tmp_path, unchanged, name):
    """(b) mergekit omits fused experts without a word, and (h) factors nn.Conv1d into nonsense or crashes on nn.Conv2d;
    here an expert or a kernel is a matrix, and a merge at full rank gives the tuned tensor back."""
    base, tuned = refusable(name)
    models.write_checkpoint(tmp_path / "base", base)
    models.write_checkpoint(tmp_path / "tuned", tuned)
    unchanged(tmp_path / "base", tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=64)
    assert CHANGED[name] in {module["name"] for module in report.modules}
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    torch.testing.assert_close(models.tensors_of(tmp_path / "merged")[name], tuned[name], rtol=1e-5, atol=1e-6)


def test_a_depthwise_kernel_is_whole(tmp_path):
    """(h) PEFT's LoRA has no kernel for it: stored as it is, and said."""
    name = "model.layers.0.mixer.conv1d.weight"
    base, tuned = refusable(name)
    models.write_checkpoint(tmp_path / "base", base)
    models.write_checkpoint(tmp_path / "tuned", tuned)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=4)
    assert name in report.whole
    assert any("depthwise" in note for note in report.notes)


@pytest.mark.parametrize("name", [*CHANGED, "model.layers.0.mixer.conv1d.weight"])
def test_b_and_h_do_not_matter_where_nothing_changed(tmp_path, name):
    """The same tensors untouched are no obstacle; excluded, they are named as left out; --save-full keeps them."""
    base, tuned = refusable(name)
    models.write_checkpoint(tmp_path / "base", base)
    models.write_checkpoint(tmp_path / "untouched", {**tuned, name: base[name]})
    models.write_checkpoint(tmp_path / "tuned", tuned)
    report = extract(tmp_path / "base", tmp_path / "untouched", tmp_path / "a", rank=4)
    assert [module["name"] for module in report.modules] == ["model.layers.0.self_attn.q_proj"]
    module = name.removesuffix(".weight").removesuffix(".gate_up_proj").removesuffix(".down_proj")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "b", rank=4, exclude=[module])
    assert name in report.left_out
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "c", rank=4, save_full=[module])
    assert name in report.whole
    merge(tmp_path / "base", [tmp_path / "c"], tmp_path / "merged")
    assert torch.equal(models.tensors_of(tmp_path / "merged")[name], tuned[name])
