"""Keys of patterns: found as PEFT finds them, however many there are."""

import random
import re
import time
from functools import partial

import pytest

from loratools.errors import MalformedError, UnsupportedError
from loratools.formats import Contents
from loratools.formats.peft import config as fields
from loratools.formats.peft import patterns
from loratools.formats.peft.codec import PeftCodec
from loratools.formats.peft.patterns import ModuleKeys, ModulePattern, WholeExpression, suffixes
from loratools.patterns import Allowance
from loratools.tensors import in_memory
from tests.tiny import normal

PIECES = ("q", "qq", "q_proj", "a", "ab", "layers", "layersX", "0", "1", "10", "1X0", "mlp", "")


def judged(keys, module):
    """PEFT's `get_pattern_key`, word for word, but None where nothing matches."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), None)


def drawn(chance):
    path = ".".join(chance.choices(PIECES, k=chance.randint(1, 4)))
    spelling = chance.choice(("plain", "plain", "escaped", "anchored", "joined", "expression"))
    if spelling == "joined":
        return path.replace(".", chance.choice((".", "X", "_")), 1)
    if spelling == "expression":
        path = path or "q"
        return chance.choice((f"{path}$", f"^{path}", f"({path}|q)", rf".*\.{re.escape(path)}", f"{path}?", r"\w+"))
    return {"plain": path, "escaped": re.escape(path), "anchored": f"^{re.escape(path)}"}[spelling]


def test_the_first_key_is_pefts():
    """Names, escaped names, anchored names and expressions, mixed; dots that meet other characters; line breaks."""
    judge = pytest.importorskip("peft.utils.other").get_pattern_key
    chance, hits, joined = random.Random(3), 0, 0
    for _ in range(2500):
        keys = list(dict.fromkeys(drawn(chance) for _ in range(chance.randint(1, 6))))
        module = ".".join(chance.choices(PIECES, k=chance.randint(1, 5)))
        if chance.random() < 0.2:
            module = module.replace(".", chance.choice(("X", "_", "\n")), 1)
        if chance.random() < 0.02:
            module += "\n"
        expected = judged(keys, module)
        assert ModuleKeys(keys).first(module) == expected, (keys, module)
        assert judge(keys, module) == (module if expected is None else expected)
        hits += expected is not None
        joined += expected is not None and not module.endswith(expected)
    assert hits > 250
    assert joined > 60


def test_idle_keys_are_those_that_match_nothing():
    chance = random.Random(4)
    for _ in range(500):
        keys = list(dict.fromkeys(drawn(chance) for _ in range(chance.randint(1, 8))))
        modules = [".".join(chance.choices(PIECES, k=chance.randint(1, 4))) for _ in range(4)]
        idle = [key for key in keys if all(judged([key], module) is None for module in modules)]
        assert ModuleKeys(keys).idle(modules) == idle, (keys, modules)


def test_suffixes():
    assert list(suffixes("a.b.")) == ["a.b.", "b.", ""]
    assert list(suffixes("")) == [""]


@pytest.mark.parametrize("escaped", [False, True])
def test_a_hundred_thousand_keys_and_modules(escaped):
    """One pass over either, not one over the other for each: H61."""
    modules = [f"model.layers.{at // 500}.mlp.experts.{at % 500}.up_proj" for at in range(100_000)]
    keys = {f"^{re.escape(module)}" if escaped else module: float(at) for at, module in enumerate(modules)}
    start = time.thread_time()
    pattern = ModulePattern(keys)
    assert [fields.matched(pattern, module, -1, field="") for module in modules] == list(range(100_000))
    assert ModuleKeys(keys).idle(modules[1:]) == [next(iter(keys))]
    assert time.thread_time() - start < 10


def test_a_million_names_are_looked_up():
    keys = {f"model.layers.{at}.self_attn.q_proj": 4 for at in range(1_000_000)}
    start = time.thread_time()
    pattern = ModulePattern(keys)
    for at in range(200):
        assert fields.matched(pattern, f"base.model.layers.{at}.self_attn.q_proj", 1, field="") == 4
    assert time.thread_time() - start < 6


def test_keys_that_are_made_to_take_long_are_given_up(monkeypatch):
    """One catastrophe; many small ones; a million different ways to place dots in names of one length."""
    monkeypatch.setattr(patterns, "Allowance", partial(Allowance, 0.5))
    module = "a" * 60 + "!.q_proj"
    chance = random.Random(0)
    dotted = {"".join(chance.choice(".a") for _ in range(60)) for _ in range(100_000)}
    for keys, modules in (
        (["(a|aa)+$"], [module]),
        ([f"(a|aa)+{at}$" for at in range(1000)], [module]),
        ([f"x{at}?" for at in range(20_000)], [f"{at}.q" for at in range(1000)]),
        (dotted, ["b" * 60] * 1000),
    ):
        start = time.thread_time()
        made = ModuleKeys(keys, file="x.json", field="rank_pattern")
        with pytest.raises(UnsupportedError, match=r"takes too long.*x\.json.*Name the modules plainly"):
            [made.first(each) for each in modules]
        assert time.thread_time() - start < 3


def test_a_key_that_is_no_expression_is_named():
    with pytest.raises(MalformedError, match=r"no regular expression.*field rank_pattern, key \("):
        ModuleKeys(["("], field="rank_pattern").first("q")


def test_a_long_plain_name_is_a_name():
    assert ModuleKeys(["n" * 1_000_000]).first("x." + "n" * 1_000_000) == "n" * 1_000_000


def test_names_to_exclude_are_compared_at_once():
    """Many names times many targets would be minutes; from a file, they could be."""
    targets = [f"model.layers.{at}.q_proj" for at in range(20_000)]
    names = [f"vision.{at}.q_proj" for at in range(20_000)]
    start = time.thread_time()
    assert fields.inherited_exclusion({"exclude_modules": [*names, "q_proj", "7.q_proj"]}, targets) == names
    assert fields.exclusion(names, targets) == names
    assert time.thread_time() - start < 3


def test_keys_that_a_path_ends_with():
    """The rule of FourierFT and C3A, which put the bare key into an expression."""
    chance, hits = random.Random(6), 0
    for _ in range(1500):
        keys = list(dict.fromkeys(".".join(chance.choices(PIECES, k=chance.randint(1, 3))) for _ in range(4)))
        module = ".".join(chance.choices(PIECES, k=chance.randint(1, 4))).replace("0", chance.choice(("0", "\n")))
        wanted = [key for key in keys if re.match(rf".*\.{key}$", module)]
        assert sorted(ModuleKeys(keys).ending(module)) == sorted(wanted), (keys, module)
        hits += len(wanted)
    assert hits > 60


def test_an_expression_for_whole_paths():
    """As `re.fullmatch` finds them; alternatives that are escaped names may be many; what takes long is given up."""
    for expression in ("a.b", r"a\.b", r"a\.b|c", "(a|c).b", "", "|a", r"^a\.b", "a.b|c$", r".*\.b"):
        for module in ("a.b", "aXb", "c", "x.a.b", "", "a.b\n", "c\n"):
            found = WholeExpression(expression).matches(module)
            assert found == (re.fullmatch(expression, module) is not None), (expression, module)
    many = "|".join(rf"model\.layers\.{at}\.mlp" for at in range(50_000))
    expression = WholeExpression(many)
    assert expression.matches("model.layers.49999.mlp")
    assert not expression.matches("model.layers.50000.mlp")
    with pytest.raises(UnsupportedError, match=r"too long.*field x"):
        WholeExpression("(a|aa)+", field="x").matches("a" * 60 + "!")
    with pytest.raises(MalformedError, match="no regular expression"):
        WholeExpression("(", field="x").matches("a")


def test_a_configuration_is_sorted_out_once_for_all_modules(monkeypatch):
    """Not again for every module: modules times keys would be minutes."""
    made = []
    real = ModuleKeys.__init__

    def counted(self, *keys, **where):
        made.append(where)
        real(self, *keys, **where)

    monkeypatch.setattr(ModuleKeys, "__init__", counted)
    tensors = {}
    for at in range(40):
        key = f"base_model.model.layers.{at}.q_proj"
        tensors |= {f"{key}.lora_A.weight": in_memory("A", normal(at, 2, 4)),
                    f"{key}.lora_B.weight": in_memory("B", normal(at, 4, 2))}  # fmt: skip
    ranks, alphas = {r"layers\.\d+": 2, "q_proj": 2}, {"39.q_proj": 64}
    config = {"peft_type": "LORA", "r": 8, "rank_pattern": ranks, "alpha_pattern": alphas}
    updates = PeftCodec().decode(Contents(tensors, config)).updates
    assert [update.alpha for update in updates.values()] == [8] * 39 + [64]
    assert sorted(where["field"] for where in made) == ["alpha_pattern", "rank_pattern"]
