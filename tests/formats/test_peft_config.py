import itertools
import json
import random

import pytest

from loratools.adapters import LowRank
from loratools.errors import MalformedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners import TUNERS, tuner_of
from loratools.tensors import in_memory
from tests.tiny import normal

LORA = {"peft_type": "LORA"}


def refuse(config):
    """What a codec asks of a configuration before it looks at a tensor."""
    tuner_of(config).refuse(config)


def test_plain_lora_is_accepted():
    """In either case, with the harmless initialisations, and with fields off."""
    for config in (
        LORA,
        {"peft_type": "lora"},
        LORA | {"init_lora_weights": "gaussian"},
        LORA | {"init_lora_weights": "eva"},
        LORA | {"use_dora": False, "layer_replication": None, "trainable_token_indices": None, "lora_bias": False},
    ):
        refuse(config)


@pytest.mark.parametrize(("field", "value", "name"), [
    ("layer_replication", [[0, 4], [2, 5]], "layer replication"),
    ("kasa_config", {}, ""),
    ("arrow_config", {"top_k": 1}, "Arrow"),
    ("alora_invocation_tokens", [1], "activated"),
])  # fmt: skip
def test_variants_are_refused_by_name(field, value, name):
    """Each changes what the factors mean."""
    if not value:
        refuse(LORA | {field: value})
        return
    with pytest.raises(UnsupportedError, match=name) as caught:
        refuse(LORA | {field: value})
    assert caught.value.where["field"] == field


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga", "loftq"])
def test_initialisations_that_change_the_base_are_refused_by_name(name):
    """They are valid only on the changed base; the way to convert them is said."""
    with pytest.raises(UnsupportedError) as caught:
        refuse(LORA | {"init_lora_weights": name})
    assert name in str(caught.value)
    assert "path_initial_model_for_weight_conversion" in str(caught.value)


@pytest.mark.parametrize("kind", ["XLORA", "OFT", "PROMPT_TUNING", "no such"])
def test_other_types_are_refused_by_name(kind):
    """H64: never half merged."""
    with pytest.raises(UnsupportedError, match=kind):
        refuse({"peft_type": kind})


@pytest.mark.parametrize("config", [{}, {"peft_type": None}, {"peft_type": 7}, {"peft_type": ["LORA"]}])
def test_a_type_that_is_none_is_malformed(config):
    """No traceback."""
    with pytest.raises(MalformedError, match="peft_type"):
        refuse(config)


PIECES = ("q_proj", "k_proj", "self_attn", "model", "layers", "0", "1", "10", "mlp", "proj", "q")
HAND = (
    "q_proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", r".*\.1\..*", "layers.1", "^model.layers.1.q_proj",
    r"layers\.(0|1)\.q_proj", "q_proj$", "proj", "(.*)", "q.proj", "", ".q_proj", "q_proj|k_proj", "(q|k)_proj",
    "^q_proj", r"model\.layers\.\d+\.mlp",
)  # fmt: skip


def overlapping():
    chance = random.Random(7)
    for _ in range(400):
        module = ".".join(chance.choices(PIECES, k=chance.randint(1, 5)))
        parts = module.split(".")
        patterns = [".".join(parts[chance.randint(0, len(parts) - 1) :]) for _ in range(2)]
        patterns += [*chance.choices(HAND, k=3), ".".join(chance.choices(PIECES, k=2)), module + "0"]
        chance.shuffle(patterns)
        yield list(dict.fromkeys(patterns)), module


def test_patterns_match_as_pefts_own_function():
    """The first key in stored order that PEFT's `get_pattern_key` finds, on many overlapping patterns."""
    judge = pytest.importorskip("peft.utils.other").get_pattern_key
    hits = 0
    for patterns, module in overlapping():
        values = dict(zip(patterns, range(1, 100), strict=False))
        expected = values.get(judge(list(values), module), 0)
        assert fields.matched(values, module, 0, field="rank_pattern") == expected, (patterns, module)
        hits += expected > 0
    assert hits > 200


def test_a_name_that_does_not_match_itself_counts_last():
    """`a+b` is no match for the module `a+b`; PEFT then looks it up plainly, after every expression."""
    judge = pytest.importorskip("peft.utils.other").get_pattern_key
    for values in ({"a+b": 1}, {"a+b": 1, ".*b": 2}, {"x": 3}):
        expected = values.get(judge(list(values), "a+b"), 0)
        assert fields.matched(values, "a+b", 0, field="rank_pattern") == expected


def updates(values, alphas=None, rslora=False):
    made = {}
    for index, (path, rank) in enumerate(values.items()):
        made[path] = LowRank(
            lora_A=in_memory("A", normal(index, rank, 4)),
            lora_B=in_memory("B", normal(index, 4, rank)),
            alpha=(alphas or {}).get(path, rank),
            use_rslora=rslora,
        )
    return made


COLLIDING = ["q", "a.q", "b.a.q", "aXq", "a.q.q", "layers.1.q", "layers.11.q", "1.q", "x.layers.1.q"]


def test_patterns_name_every_module_apart_for_peft():
    """Whatever suffixes collide, PEFT's function gives every module its own value under our patterns.

    PEFT sorts nothing, but JSON with sorted keys may: both orders are tried.
    """
    judge = pytest.importorskip("peft.utils.other").get_pattern_key
    for count in (2, 3):
        for paths in itertools.permutations(COLLIDING, count):
            values = {path: float(index + 1) for index, path in enumerate(paths)}
            made = fields.patterns(values, 1.0, list(paths))
            for pattern in (made, dict(sorted(made.items())), json.loads(json.dumps(made, sort_keys=True))):
                got = {path: pattern.get(judge(list(pattern), path), 1.0) for path in paths}
                assert got == values, (paths, made)


def test_patterns_are_plain_paths_where_that_is_enough():
    """Other readers than PEFT know plain paths best."""
    assert fields.patterns({"a.q": 2.0, "a.k": 1.0}, 1.0, ["a.q", "a.k"]) == {"a.q": 2.0}
    anchored = fields.patterns({"q": 2.0, "a.q": 1.0}, 1.0, ["q", "a.q"])
    assert list(anchored) == ["^q"]


def test_the_configuration_gives_every_module_its_scaling_back():
    """Ranks and alphas that differ, rsLoRA mixed with plain: read as PEFT reads it, the scaling is the update's."""
    made = updates({"q": 2, "a.q": 3, "b.a.q": 4, "k": 3}, {"q": 7.0, "a.q": 0.5, "k": -2.0})
    for mixed in (made, made | updates({"v": 4}, {"v": 3.0}, rslora=True), updates({"v": 4, "q": 2}, rslora=True)):
        config = TUNERS["LORA"].fields(mixed, siblings=())
        assert config["target_modules"] == list(mixed)
        for path, update in mixed.items():
            rank, alpha = fields.rank_of(config, path), fields.alpha_of(config, path)
            assert rank == update.rank
            scaling = alpha / (rank**0.5 if config["use_rslora"] else rank)
            assert scaling == pytest.approx(update.scaling, rel=1e-15)


def test_neighbours_that_peft_would_catch_are_excluded():
    """A target that is a suffix of another module's path catches it; the list of exclusions says not to."""
    siblings = ["q", "a.q", "a.xq", "a.q.b", "b.k"]
    assert fields.collateral(["q"], siblings) == ["a.q"]
    assert TUNERS["LORA"].fields(updates({"q": 2}), siblings)["exclude_modules"] == ["a.q"]
    assert "exclude_modules" not in TUNERS["LORA"].fields(updates({"b.k": 2}), siblings)


def test_excluded_neighbours_are_left_alone_by_peft():
    """PEFT itself injects exactly the targets."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.a = torch.nn.Linear(4, 4), torch.nn.Module()
            self.a.q, self.a.k = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    config = TUNERS["LORA"].fields(updates({"q": 2}), ["q", "a", "a.q", "a.k"])
    model = peft.get_peft_model(Net(), peft.LoraConfig(**config))
    wrapped = {
        name.removesuffix(".lora_A") for name, _ in model.base_model.model.named_modules() if name.endswith("lora_A")
    }
    assert wrapped == {"q"}


def test_keys_that_name_code_are_not_repeated_and_unknown_ones_are_kept():
    """H62: what PEFT would import stays behind; a field of a newer PEFT travels on."""
    config = LORA | {
        "auto_mapping": {"parent_library": "os"}, "megatron_core": "antigravity",
        "corda_config": {"cache_file": "x.pt"},
        "a_field_of_2031": [1, {"x": None}], "revision": "main",
    }  # fmt: skip
    kept = fields.inherited(config, "LORA")
    assert kept == {"peft_type": "LORA", "a_field_of_2031": [1, {"x": None}], "revision": "main"}


@pytest.mark.parametrize("value", [True, "8", [8], {}, float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("field", ["lora_alpha", "r"])
def test_a_number_that_is_none_is_malformed(field, value):
    """H55: named with field and value; never a TypeError, nor an OverflowError."""
    with pytest.raises(MalformedError) as caught:
        (fields.alpha_of if field == "lora_alpha" else fields.rank_of)({field: value}, "q")
    assert caught.value.where["field"] == field


@pytest.mark.parametrize(
    "pattern", [["q"], "q", 7, {"q": "2"}, {"q": float("nan")}, {"(": 2}, {"q": None} | {"q": [1]}]
)
def test_a_pattern_that_is_none_is_malformed(pattern):
    """Of every wrong type, and expressions that are none."""
    with pytest.raises(MalformedError):
        fields.alpha_of({"alpha_pattern": pattern}, "q")


def test_missing_fields_are_pefts_defaults():
    """r = 8, alpha = 8."""
    assert (fields.rank_of({}, "q"), fields.alpha_of({}, "q")) == (8, 8)
