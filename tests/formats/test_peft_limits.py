"""What no honest configuration says is refused; what honest ones say is not."""

import sys

import pytest

from loratools.errors import MalformedError
from loratools.formats.peft.limits import refuse_absurd, require_ranks

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
