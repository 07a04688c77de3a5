import pytest

from loratools.checkpoints import Checkpoint, Module, facts
from loratools.tensors import TensorRef, TensorSpec


def checkpoint(names, **config):
    specs = {name: TensorSpec(name, "F32", shape) for name, shape in names.items()}
    return Checkpoint({name: TensorRef(spec, None, 0) for name, spec in specs.items()}, (), config)


def module(**parameters):
    specs = {name: TensorSpec(f"m.{name}", dtype, shape) for name, (dtype, shape) in parameters.items()}
    return Module("m", "other", specs, "confirmed")


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"], "GPT-2-like"),
        (["x.self_attn.q_proj.weight", "x.post_attention_layernorm.weight"], "Llama-like"),
        (["x.self_attn.q_proj.weight"], None),
        ([], None),
    ],
)
def test_a_family_is_inferred_from_all_of_its_signs_or_unknown(names, family):
    found = facts.family_of(checkpoint(dict.fromkeys(names, (2, 2))))
    assert (found.model_type, found.evidence) == (family, "inferred" if family else "unknown")


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "llama", "architectures": ["L", 3]}, facts.Family("llama", ("L",), "confirmed")),
        ({"architectures": ["L"]}, facts.Family(None, ("L",), "confirmed")),
        ({"model_type": ["llama"], "architectures": "L"}, facts.Family(None, (), "unknown")),
    ],
)
def test_the_config_confirms_what_it_says_in_its_proper_form(config, family):
    assert facts.family_of(checkpoint({}, **config)) == family


def test_a_tie_needs_the_embedding_among_the_chosen():
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    tied = checkpoint({"transformer.wte.weight": (5, 2)}, **config)
    assert facts.tie_of(tied, {"transformer.wte"}) == facts.Tie(
        "lm_head.weight", "transformer.wte.weight", stored=False, evidence="inferred"
    )
    assert facts.tie_of(tied, {"transformer.h.0"}) is None
    assert facts.tie_of(checkpoint({"a.weight": (5, 2)}), {"a"}) is None


def test_what_counts():
    assert facts.counted(module(weight=("F32", (2, 3)), bias=("F32", (2,)))) == 8
    assert facts.counted(module(bias=("F32", (1, 1, 8, 8)), running_mean=("F32", (4,)), ids=("I64", (4,)))) == 0
    tie = facts.Tie("m.weight", "e.weight", stored=True, evidence="confirmed")
    assert facts.counted(module(weight=("F32", (2, 3)), bias=("F32", (2,))), tie) == 2


def test_a_face_is_the_weight_or_the_only_tensor():
    assert facts.face(module(bias=("F32", (2,)), weight=("BF16", (2, 3)))) == ((2, 3), "BF16")
    assert facts.face(module(A_log=("F32", (7,)))) == ((7,), "F32")
    assert facts.face(module(qweight=("I32", (7,)), scales=("F16", (1,)))) == (None, "F16+I32")
