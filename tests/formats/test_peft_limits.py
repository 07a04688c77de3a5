"""What no honest configuration says is refused; what honest ones say is not."""

import dataclasses
import json
import sys

import pytest
import torch

from loratools.adapters import Adapter
from loratools.errors import MalformedError, MismatchError, UnsupportedError
from loratools.formats import Contents
from loratools.formats.peft.codec import PeftCodec
from loratools.formats.peft.limits import refuse_absurd, require_ranks
from loratools.tensors import in_memory
from tests.tiny import normal

VISION = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)
"""What a popular trainer writes for the language part of a vision model."""
HONEST = [
    {},
    {"r": 16, "rank_pattern": {}, "alpha_pattern": None, "auto_mapping": None, "megatron_core": "megatron.core"},
    {"auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers.models.bert.modeling_bert"}},
    {"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"}},
    {"auto_mapping": {"base_model_class": "Net", "parent_library": "mine.models"}},
    {"target_modules": VISION},
    {"target_modules": r".*\.(q|k|v|o)_proj$", "exclude_modules": r".*vision.*"},
    {"target_modules": r"^(?!.*patch_embed).*(?:q_proj|up_proj).*"},
    {"exclude_modules": "|".join(rf"model\.layers\.{layer}\.mlp\.down_proj" for layer in range(400))},
    {"target_modules": ["(a+)+$"]},
    {"rank_pattern": {f"model.layers.{layer}.experts.{at}.down_proj": 8 for layer in range(60) for at in range(256)}},
    {"rank_pattern": {r"layers\.(0|1)\.q_proj": 4, r".*\.[4-9]\..*": 32}},
]


@pytest.mark.parametrize("config", HONEST)
def test_honest_configurations_pass(config):
    """As PEFT and trainers write them, and as we do."""
    refuse_absurd(config)
    require_ranks(config)


@pytest.mark.parametrize("library", ["os", "subprocess", "antigravity", "importlib.util", "builtins", 7, ["os"]])
def test_a_library_that_holds_no_model_is_refused(library):
    """Without looking at it, let alone importing it."""
    before = set(sys.modules)
    with pytest.raises(MalformedError, match="auto_mapping"):
        refuse_absurd({"auto_mapping": {"base_model_class": "x", "parent_library": library}})
    assert set(sys.modules) == before


@pytest.mark.parametrize("core", ["os", "megatronx", "..", 7])
def test_a_megatron_that_is_none_is_refused(core):
    with pytest.raises(MalformedError, match="megatron_core"):
        refuse_absurd({"megatron_core": core})


@pytest.mark.parametrize("expression", ["(a+)+$", "(a|aa)+$", "(?!.*visual)(?:.*\\.)+(?:q|k)_proj", "q" * 2001])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_how_an_expression_looks_is_no_reason(field, expression):
    """Those of patterns are matched in bounded time; no other one is matched."""
    refuse_absurd({field: {expression: 4} if "pattern" in field else expression})


def test_more_keys_than_a_model_has_modules_are_refused():
    keys = {f"q{at}": 4 for at in range((1 << 17) + 1)}
    with pytest.raises(MalformedError, match=r"131073 keys.*alpha_pattern"):
        refuse_absurd({"alpha_pattern": keys})
    keys.pop("q0")
    refuse_absurd({"alpha_pattern": keys})


@pytest.mark.parametrize("rank", [0, -1, 0.5, (1 << 20) + 1, True, "4", [4]])
def test_a_rank_that_cannot_be_is_refused(rank):
    for config in ({"r": rank}, {"rank_pattern": {"q": 4, "k": rank}}):
        with pytest.raises(MalformedError, match="rank"):
            require_ranks(config)


def read(shapes, **config):
    """What the codec makes of one module `q` with such tensors, and the adapter's configuration."""
    tensors = {key: in_memory(key, normal(1, *shape)) for key, shape in shapes.items()}
    named = {f"base_model.model.q.{role}": ref for role, ref in tensors.items()}
    return PeftCodec().decode(Contents(named, config)).updates["q"]


LORA = {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}
ADALORA = {"lora_A": (2, 4), "lora_B": (4, 2), "lora_E": (2, 1)}
LOKR = {"lokr_w1": (2, 2), "lokr_w2": (2, 2)}
OFT = {"oft_R.weight": (2, 1)}
OFT_CONFIG = {"peft_type": "OFT", "oft_block_size": 2, "r": 0, "peft_version": "0.21.0"}
FOURIER = {"fourierft_spectrum": (3,)}


@pytest.mark.parametrize(
    ("shapes", "field", "config"),
    [
        (ADALORA, "init_r", {"peft_type": "ADALORA", "init_r": 10**12}),
        (ADALORA, "init_r", {"peft_type": "ADALORA", "init_r": 12.5}),
        (ADALORA, "target_r", {"peft_type": "ADALORA", "target_r": 10**12}),
        (LOKR, "rank", {"peft_type": "LOKR", "r": 10**12}),
        (LOKR, "decompose_factor", {"peft_type": "LOKR", "r": 2, "decompose_factor": 2.5}),
        (OFT, "num_cayley_neumann_terms", {**OFT_CONFIG, "num_cayley_neumann_terms": 1025}),
        (FOURIER, "random_loc_seed", {"peft_type": "FOURIERFT", "random_loc_seed": 1 << 64}),
        (FOURIER, "random_loc_seed", {"peft_type": "FOURIERFT", "random_loc_seed": -(1 << 63) - 1}),
        (LORA, "use_bdlora", {"peft_type": "LORA", "r": 2, "use_bdlora": True}),
        (LORA, "nblocks", {"peft_type": "LORA", "use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 1.5}}),
        (LORA, "qalora_group_size", {"peft_type": "LORA", "use_qalora": True, "qalora_group_size": 16.9}),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(shapes, field, config):
    """Enormous, or no whole number where one is meant."""
    with pytest.raises(MalformedError) as caught:
        read(shapes, **config)
    assert field in str(caught.value)


def test_settings_at_the_limit_are_read():
    assert read(OFT, **OFT_CONFIG, num_cayley_neumann_terms=1024).neumann_terms == 1024
    for seed in (-(1 << 63), (1 << 64) - 1):
        found = read(FOURIER, peft_type="FOURIERFT", random_loc_seed=seed)
        assert found.seed == seed
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("side", "shapes"),
    [
        ("a", {"lora_A.weight": (0, 2), "lora_B.weight": (4, 0)}),
        ("b", {"lora_A.weight": (0, 4), "lora_B.weight": (4, 0)}),
    ],
)
def test_a_block_diagonal_update_of_no_rank_is_refused(side, shapes):
    with pytest.raises(MismatchError):
        read(shapes, peft_type="LORA", use_bdlora={f"target_modules_bd_{side}": ["q"], "nblocks": 2})


def test_what_pruning_kept_is_written_only_where_it_took_something():
    """However large init_r is; where the list could not be read again, it is not built."""
    config = {"peft_type": "ADALORA", "init_r": 1 << 20, "rank_pattern": {"q.lora_E": [True, True]}}
    pruned = read(ADALORA, **config)
    with pytest.raises(UnsupportedError, match="rank_pattern"):
        PeftCodec().encode(Adapter({f"m{at}.q": pruned for at in range(5)}, config=config))
    whole = dataclasses.replace(pruned, ranknum=2)
    (text,) = PeftCodec().encode(Adapter({"q": whole}, config=config)).texts.values()
    assert json.loads(text)["rank_pattern"] is None
