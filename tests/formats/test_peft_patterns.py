"""Keys of patterns: found as PEFT finds them, however many there are."""

import random
import re
import time
from functools import partial

import pytest

from loratools.errors import MalformedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft import patterns
from loratools.formats.peft.patterns import ModuleKeys, suffixes
from loratools.patterns import Allowance

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
    pattern = fields.ModulePattern(keys, "alpha_pattern")
    assert [pattern.of(module, -1) for module in modules] == list(range(100_000))
    assert pattern.idle(modules[1:]) == [next(iter(keys))]
    assert time.thread_time() - start < 10


def test_a_million_names_are_looked_up():
    keys = {f"model.layers.{at}.self_attn.q_proj": 4 for at in range(1_000_000)}
    start = time.thread_time()
    pattern = fields.ModulePattern(keys, "alpha_pattern")
    for at in range(200):
        assert pattern.of(f"base.model.layers.{at}.self_attn.q_proj", 1) == 4
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
