import pytest

from loratools.checkpoints import modules_of, owner
from loratools.tensors import TensorSpec


def modules(config=None, **shapes):
    specs = {}
    for name, shape in shapes.items():
        dtype, extent = shape if isinstance(shape[0], str) else ("BF16", shape)
        key = name.replace("__", ".")
        specs[key] = TensorSpec(key, dtype, extent)
    return modules_of(specs, config or {})


def kind(name, config=None, **shapes):
    module = modules(config, **shapes)[name]
    return module.kind, module.evidence


def test_a_tensor_belongs_to_the_path_before_its_last_dot():
    """A bare name belongs to the root."""
    assert owner("model.layers.0.mixer.A_log") == ("model.layers.0.mixer", "A_log")
    assert owner("logit_scale") == ("", "logit_scale")
    assert set(modules(a__weight=(2, 3), a__bias=(2,), b=(1,))) == {"a", ""}


def test_a_bias_tells_which_way_a_matrix_lies():
    """The bias has as many entries as the module has outputs; a square matrix stays undecided."""
    assert kind("x", x__weight=(4, 6), x__bias=(4,)) == ("linear", "confirmed")
    assert kind("x", x__weight=(4, 6), x__bias=(6,)) == ("conv1d", "confirmed")
    assert kind("x", x__weight=(4, 4), x__bias=(4,)) == ("linear", "inferred")
    assert kind("x", x__weight=(4, 6)) == ("linear", "inferred")


def test_the_family_tells_conv1d():
    """GPT-2's modules are Conv1D by their names, square ones too; in another family the names mean nothing."""
    gpt2 = {"model_type": "gpt2"}
    assert kind("h.0.attn.c_proj", gpt2, h__0__attn__c_proj__weight=(4, 4)) == ("conv1d", "confirmed")
    assert kind("h.0.attn.c_proj", {"model_type": "llama"}, h__0__attn__c_proj__weight=(4, 4))[0] == "linear"


@pytest.mark.parametrize("name", ["model.embed_tokens", "wte", "bert.embeddings.word_embeddings", "shared"])
def test_embeddings_are_known_by_name(name):
    """Inferred, since no shape gives them away."""
    assert kind(name, **{f"{name.replace('.', '__')}__weight": (32, 4)}) == ("embedding", "inferred")


def test_other_kinds():
    """Norms, convolutions, fused experts, quantised weights, modules without a weight."""
    assert kind("n", n__weight=(4,))[0] == "norm"
    assert kind("c", c__weight=(4, 3, 3, 3))[0] == "conv"
    assert kind("mlp.experts", mlp__experts__weight=(8, 4, 3))[0] == "experts"
    assert kind("mlp.experts", mlp__experts__gate_up_proj=(8, 4, 3))[0] == "experts"
    assert kind("q", q__weight=("U8", (4, 4))) == ("quantised", "confirmed")
    assert kind("q", q__weight=("F8_E4M3", (4, 4))) == ("quantised", "confirmed")
    assert kind("m", m__A_log=(4,)) == ("other", "confirmed")


@pytest.mark.parametrize(
    ("name", "shape", "bias", "expected"),
    [
        ("feature_extractor.conv_layers.0.conv", (6, 4, 3), None, ("conv", "inferred")),
        ("mixer.conv1d", (6, 1, 4), (6,), ("conv", "confirmed")),
        ("mlp.experts.0.conv1d", (6, 1, 4), None, ("conv", "inferred")),
        ("mlp.experts.0.short", (6, 1, 4), (6,), ("conv", "confirmed")),
        ("mlp.experts", (6, 4, 3), (6, 4), ("experts", "confirmed")),
        ("block_sparse_moe.input_linear", (6, 4, 3), None, ("experts", "inferred")),
        ("mlp.output_linear", (6, 4, 3), None, ("experts", "inferred")),
        ("mlp.up", (6, 4, 3), (6, 4), ("experts", "confirmed")),
        ("deconv", (6, 4, 3), (4,), ("conv", "inferred")),
        ("vision.experts.patch", (6, 3, 4, 4), None, ("conv", "inferred")),
        ("video.proj", (6, 3, 2, 4, 4), (6,), ("conv", "confirmed")),
    ],
)
def test_a_convolution_is_told_from_experts(name, shape, bias, expected):
    """Three axes: by the bias, then by the path; more than three are never experts."""
    tensors = {"weight": shape, **({"bias": bias} if bias else {})}
    assert kind(name, **{f"{name.replace('.', '__')}__{key}": value for key, value in tensors.items()}) == expected


def test_only_conv1d_and_embeddings_are_stored_transposed():
    """What merges and extractions ask."""
    found = modules(
        {"model_type": "gpt2"}, wte__weight=(32, 4), c_attn__weight=(4, 12), x__weight=(4, 5), n__weight=(4,)
    )
    assert {name: module.stored_transposed for name, module in found.items()} == {
        "wte": True, "c_attn": True, "x": False, "n": False,
    }  # fmt: skip
    assert found["x"].numel == 20
