import random
import re
import time

import pytest

from loratools.adapters import Selection
from loratools.adapters.selection import matches_any
from loratools.errors import UsageError

PATHS = [f"model.layers.{i}.{m}" for i in range(25) for m in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head", ""]


def chosen(*include, exclude=()):
    return Selection(include, exclude).selected(PATHS)


def test_a_name_matches_from_a_dot_to_the_end_only():
    """`q_proj` matches a last component, never a part of one, and nothing below it."""
    assert chosen("q_proj") == [path for path in PATHS if path.endswith(".q_proj")]
    for pattern in ("proj", "q_pro", "self_attn", "_proj", "head"):
        with pytest.raises(UsageError):
            chosen(pattern)
    assert chosen("lm_head") == ["lm_head"]


def test_a_star_crosses_dots():
    """`layers.1.*` is everything below layer 1, and not layers 10 to 19."""
    assert chosen("layers.1.*") == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert chosen("model.*.q_proj") == chosen("q_proj")
    assert chosen("**") == PATHS


def test_a_question_mark_is_one_character():
    """`layers.?.` stops at layer 9."""
    assert len(chosen("layers.?.mlp.down_proj")) == 10


def test_braces_are_ranges_and_alternatives():
    """`{10-20}` holds both ends and no 1 or 2; `{a,b}` is one of the two, literally."""
    assert chosen("layers.{10-20}.mlp.*") == [f"model.layers.{i}.mlp.down_proj" for i in range(10, 21)]
    assert len(chosen("layers.3.{self_attn.q_proj,mlp.down_proj}")) == 2
    assert matches_any(["{a.b,c}"], "a.b")
    assert not matches_any(["{a.b,c}"], "axb")


def test_dots_in_a_glob_are_dots():
    """Nothing in a glob but its own signs is special."""
    assert not matches_any(["layersx1"], "layers.1")
    assert not matches_any(["layers.1"], "layersx1")
    assert matches_any(["a+b(c)"], "x.a+b(c)")


def test_re_is_searched_anywhere():
    """`re:` introduces an expression that need not reach the end."""
    assert chosen(r"re:layers\.(3|4)\.mlp") == ["model.layers.3.mlp.down_proj", "model.layers.4.mlp.down_proj"]
    assert chosen("re:^lm") == ["lm_head"]


def test_exclude_takes_from_include_and_order_stays():
    """Chosen paths come in the order of the model."""
    assert chosen("layers.{2-1000}.*", exclude=["re:[1-9][0-9]", "down_proj"]) == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2, 10)
    ]
    assert chosen("lm_head", "layers.0.*") == [*PATHS[:2], "lm_head"]
    assert chosen() == PATHS


@pytest.mark.parametrize("pattern", ["nothing", "layers.25.*", "re:^layers", "layers.{25-30}.*", "Q_PROJ"])
@pytest.mark.parametrize("side", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(pattern, side):
    """Both ways round, and the error names the pattern."""
    with pytest.raises(UsageError) as caught:
        Selection(**{side: (pattern,)}).selected(PATHS)
    assert pattern in str(caught.value)


def test_patterns_that_leave_nothing_are_an_error():
    """Excluding all that is included is a mistake, not an empty result."""
    with pytest.raises(UsageError, match="leave no module"):
        chosen("q_proj", exclude=["*"])


@pytest.mark.parametrize("pattern", ["", "re:(", "re:*", "{20-10}", "{0-1000000}", "x" * 2001])
def test_a_pattern_that_is_none_is_a_usage_error(pattern):
    """Never a traceback of `re`, never a gigabyte of alternatives."""
    with pytest.raises(UsageError):
        matches_any([pattern], "x")


@pytest.mark.parametrize("pattern", ["re:(a|aa)+$", "re:" + "(a|a)" * 60 + "$"])
def test_an_expression_that_would_run_for_hours_is_given_up(pattern):
    """Typed by mistake, it ends in a second, and the message says which pattern and what to do."""
    start = time.thread_time()
    for select in (Selection((pattern,)), Selection(exclude=(pattern,))):
        with pytest.raises(UsageError, match=r"not matched: it takes too long.*write a glob") as caught:
            select.selected(["a" * 60 + "!.q_proj"] * 1000)
        assert caught.value.where["pattern"] == pattern
    with pytest.raises(UsageError, match="takes too long"):
        matches_any([pattern], "a" * 60 + "!")
    assert time.thread_time() - start < 3


def test_many_stars_are_answered():
    """A glob needs no engine: its time grows with the lengths, whatever stands between the stars."""
    start = time.thread_time()
    assert not matches_any(["*a" * 200 + "*b"], "a" * 900)
    assert matches_any(["*a" * 200 + "*b"], "a" * 900 + "b")
    assert not matches_any(["*{1,11}" * 100 + "x"], "1" * 900)
    assert matches_any(["{0-99999}" * 5], "1" * 25)
    assert time.thread_time() - start < 2


def test_globs_match_as_the_expressions_that_they_stand_for():
    """On random globs and paths; a number of a range has no leading zero."""
    chance, hits = random.Random(0), 0
    parts = {"*": ".*", "?": ".", "{a,ab}": "(?:a|ab)", "{9-11}": "(?:9|10|11)", "{,b}": "(?:|b)", ".": r"\.",
             "a": "a", "b": "b", "1": "1", "0": "0", "+": r"\+", "{0-1}": "[01]"}  # fmt: skip
    for _ in range(8000):
        glob = chance.choices(list(parts), k=chance.randint(1, 5))
        path = "".join(chance.choices("ab.109+", k=chance.randint(0, 7)))
        wanted = re.search(rf"(?:^|\.)(?:{''.join(parts[part] for part in glob)})\Z", path) is not None
        assert matches_any(["".join(glob)], path) == wanted, (glob, path)
        hits += wanted
    assert hits > 300
    assert not matches_any(["layers.{0-20}"], "layers.007")
