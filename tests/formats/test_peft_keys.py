import pytest

from loratools.errors import MalformedError, UnsupportedError
from loratools.formats.peft import keys
from loratools.formats.peft.tuners import TUNERS

P = keys.PREFIX
ROLES = TUNERS["LORA"].roles


@pytest.mark.parametrize(("key", "expected"), [
    ("model.layers.0.q_proj.lora_A.weight", ("model.layers.0.q_proj", "lora_A.weight", "")),
    ("model.layers.0.q_proj.lora_B.weight", ("model.layers.0.q_proj", "lora_B.weight", "")),
    ("embed_tokens.lora_embedding_A", ("embed_tokens", "lora_embedding_A", "")),
    ("embed_tokens.lora_embedding_B", ("embed_tokens", "lora_embedding_B", "")),
    ("q_proj.base_layer.bias", ("q_proj", "base_layer", "bias")),
    ("embed_tokens.base_layer.weight", ("embed_tokens", "base_layer", "weight")),
    ("score.weight", ("score", "parameter", "weight")),
    ("mixer.A_log", ("mixer", "parameter", "A_log")),
    ("logit_scale", ("", "parameter", "logit_scale")),
])  # fmt: skip
def test_what_a_key_says(key, expected):
    """Module, role, and the parameter's name where it is given whole."""
    parsed = keys.parse(P + key, ROLES)
    assert (parsed.module, parsed.role, parsed.parameter) == expected


@pytest.mark.parametrize("module", ["a", "model.layers.10.mlp.down_proj", "h.0.attn.c_attn", "weird-name.0"])
@pytest.mark.parametrize(("kind", "role"), [(kind, role) for kind, tuner in TUNERS.items() for role in tuner.roles])
def test_the_keys_of_every_tuner_read_back(module, kind, role):
    """decode(encode) of a key is the key."""
    found = keys.parse(keys.role_key(module, role), TUNERS[kind].roles)
    assert (found.module, found.role, found.parameter) == (module, role, "")


@pytest.mark.parametrize("module", ["", "score", "model.norm"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_parameter_keys_read_back(module, wrapped):
    """A bare parameter of the root has no module, and so no wrapper."""
    if not module and wrapped:
        return
    parsed = keys.parse(keys.parameter_key(module, "weight", wrapped=wrapped), ROLES)
    assert (parsed.module, parsed.role, parsed.parameter) == (
        module,
        "base_layer" if wrapped else "parameter",
        "weight",
    )


REFUSED = {
    "embed.trainable_tokens_delta": "trainable tokens",
    "q.lora_E": "AdaLoRA",
    "q.hada_w1_a": "LoHa",
    "q.hada_t1": "LoHa",
    "q.lokr_w1": "LoKr",
    "q.lokr_w2_a": "LoKr",
    "q.lokr_t2": "LoKr",
    "q.vera_lambda_b": "VeRA",
    "q.ia3_l": "IA3",
    "q.oft_R.weight": "OFT",
    "q.oft_r": "OFT",
    "q.boft_R": "BOFT",
    "q.boft_s": "BOFT",
    "q.hra_u": "HRA",
    "q.miss_block": "MiSS",
    "q.fourierft_spectrum": "FourierFT",
    "q.lora_A.default.weight": "adapter name",
    "q.modules_to_save.default.weight": "wrapper's name",
}


@pytest.mark.parametrize(("key", "kind"), REFUSED.items())
def test_other_kinds_are_refused_by_name(key, kind):
    """Never half read: the kind and the key are in the message."""
    with pytest.raises(UnsupportedError) as caught:
        keys.parse(P + key, ROLES)
    assert kind in str(caught.value)
    assert key in str(caught.value)


def test_kinds_without_the_usual_prefix_are_refused_by_name():
    """VeRA's shared projections and prompt tuning."""
    for key, kind in (("base_model.vera_A", "VeRA"), ("prompt_embeddings", "prompt tuning")):
        with pytest.raises(UnsupportedError, match=kind):
            keys.parse(key, ROLES)


#: keys of kinds that have no entry of their own
OTHERS = (
    "q.lora_embedding_A.default", "q.randlora_lambda", "q.shira_weight", "q.c3a_kernel", "q.gralora_A", "q.delora_A",
    "q.road_theta", "q.vblora_logits_A", "q.lora_A.bias", "q.lora_diag", "q.kasa_diag",
)  # fmt: skip


@pytest.mark.parametrize("key", OTHERS)
def test_keys_of_kinds_we_do_not_list_are_not_whole_parameters(key, tmp_path):
    """A key that is no parameter of the base must end in an error at the latest when it meets the base."""
    from loratools.verbs.merge import merge
    from tests.tiny import Q, factors, lora_tensors, normal, write_adapter, write_checkpoint

    tensors = lora_tensors(factors(modules={Q: (16, 16)})) | {P + key.replace("q.", f"{Q}.", 1): normal(1, 4)}
    with pytest.raises((UnsupportedError, ValueError)) as caught:
        merge(write_checkpoint(tmp_path / "base"), [write_adapter(tmp_path / "a", tensors)], tmp_path / "out")
    assert key.split(".")[1] in str(caught.value) or key in str(caught.value)


@pytest.mark.parametrize("key", ["lora_unet_down.lora_down.weight", "model.q.lora_A.weight", "", "base_model.q.weight"])
def test_a_key_of_another_grammar_is_malformed(key):
    """Named, with the prefix that is expected."""
    with pytest.raises(MalformedError, match="base_model"):
        keys.parse(key, ROLES)
