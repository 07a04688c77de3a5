"""Expressions of strangers: read as `re` reads them, and given up in time."""

import contextlib
import random
import re
import resource
import subprocess
import sys
import time
import warnings

import pytest

from loratools.patterns import Allowance, CostlyExpressionError, InvalidExpressionError

ATOMS = ("a", "b", "q", "0", ".", "_", r"\.", r"\d", r"\w", r"\W", r"\s", r"\D", "[ab]", "[^a.]", "[a-q]", "[]a]",
         "[^]a]", r"[\w.]", "[a-]", "layers", "q_proj", "é", r"\_", "^", "$", r"\A", r"\Z", r"\b", "(?=a)", "(?!b)",
         "(?<=a)", "(?<!_)", "(?!.*b)", "\n", "]", "}")  # fmt: skip
QUANTIFIERS = ("", "", "", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{,}")
OPENINGS = ("(", "(?:", "(?=", "(?!", "(?P<x>", "(?s:", "(?m:", "(?x:")
LETTERS = ("a", "b", "q", "0", "1", ".", "_", "-", "A", "é", "\n", "layers", "q_proj")


def expression(chance, depth):
    """Groups are not repeated: on those `re` itself would take for ever."""
    made = []
    for _ in range(chance.randint(1, 4)):
        if depth and chance.random() < 0.3:
            made.append(f"{chance.choice(OPENINGS)}{expression(chance, depth - 1)}){chance.choice(('', '', '?'))}")
        elif chance.random() < 0.1:
            made.append("|")
        else:
            made.append(chance.choice(ATOMS) + chance.choice(QUANTIFIERS))
    return "".join(made)


def understood(text):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(text)
    except re.error:
        return None


def compared(count, seed):
    """(expression, text, answer of `re`, answer of ours) for `match` and `search`, on random expressions."""
    chance = random.Random(seed)
    for _ in range(count):
        made = expression(chance, 2)
        if chance.random() < 0.5:
            made = rf"(.*\.)?({made})$"
        judge, allowance = understood(made), Allowance()
        for _ in range(8):
            text = "".join(chance.choices(LETTERS, k=chance.randint(0, 8)))
            for method, ours in (("match", allowance.matches), ("search", allowance.finds)):
                if judge is None:
                    with pytest.raises(InvalidExpressionError):
                        ours(made, text)
                else:
                    yield made, text, getattr(judge, method)(text) is not None, ours(made, text)


def test_it_matches_as_re_does():
    rows = list(compared(1500, 0))
    assert [row for row in rows if row[2] != row[3]] == []
    assert 2000 < sum(row[2] for row in rows) < len(rows) - 2000


@pytest.mark.slow
def test_it_matches_as_re_does_on_many_more():
    assert [row for row in compared(60_000, 1) if row[2] != row[3]] == []


@pytest.mark.parametrize(
    "text", [r"\p{L}", "(?R)", r"\X", "(?|a|b)", r"\K", "(*PRUNE)a", "(?e)a", r"\m", "(?1)", "(?&x)"]
)
def test_what_only_the_other_engine_knows_is_no_expression(text):
    assert understood(text) is None
    with pytest.raises(InvalidExpressionError):
        Allowance().matches(text, "a")


@pytest.mark.parametrize("text", ["a{e}", "(?:ab){e<=1}", "a{1e}", "a{}", "[[:alpha:]]", "[x[:^digit:]]"])
def test_what_the_two_engines_read_differently_is_refused(text):
    assert understood(text)
    with pytest.raises(InvalidExpressionError, match=r"brace|class"):
        Allowance().matches(text, "a")


@pytest.mark.parametrize("text", ["(", "a**", "[", "(?P<1>a)", "a{2,1}", "a{99999999999}", "(" * 990 + ")" * 990])
def test_what_is_none(text):
    with pytest.raises(InvalidExpressionError):
        Allowance().finds(text, "a")


A = "a" * 60 + "!.q_proj"
CATASTROPHES = {
    "(a+)+$": A,
    "(a|aa)+$": A,
    "(.*a){20}": "a" * 19 + "b" * 40 + "!.q",
    r"(\w+\s?)*$": A,
    "(a?){60}a{60}": "a" * 59,
    "(a|a)" * 60 + "$": "a" * 60 + "!",
    "(?:a{0,100}){0,100}b": "a" * 900,
    ".*a.*a.*a.*a.*a.*a.*a.*a.*b": "a" * 900,
    "((((a*)*)*)*)*b": "a" * 900,
    r"((a|b|ab)*)*\1c": "ab" * 400,
    "(a*)" * 99 + "".join(f"\\{at}" for at in range(1, 99)) + "b": "a" * 60,
    "(?i)" + r"[\0-\U0010ffff]" * 100: A,
}


@pytest.mark.parametrize("text", CATASTROPHES)
def test_what_could_take_hours_ends_in_time(text):
    """With an answer or without, in a second or two of computing, and in little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for method in (Allowance().matches, Allowance().finds):
        for wrapped in (text, rf"(.*\.)?({text})$"):
            start = time.thread_time()
            with contextlib.suppress(CostlyExpressionError, InvalidExpressionError):
                method(wrapped, CATASTROPHES[text])
            assert time.thread_time() - start < 1.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_what_cannot_be_answered_is_said():
    with pytest.raises(CostlyExpressionError, match="it takes too long"):
        Allowance().matches("(a|aa)+$", A)


@pytest.mark.parametrize("text", ["a{4000000000}", "(?:(?:a{1000}){1000}){1000}", "(?:a{2}" * 60 + "){2}" * 60])
def test_repetitions_that_would_be_unrolled_into_gigabytes_are_refused(text):
    with pytest.raises(InvalidExpressionError, match="repetitions multiply"):
        Allowance().matches(text, "a")
    assert Allowance().matches(r"layers\.\d{1,3}\.x{2}", "layers.12.xx")


def test_lengths_are_limited():
    with pytest.raises(CostlyExpressionError, match="it has more than 2000"):
        Allowance().matches("x" * 2001, "x")
    with pytest.raises(CostlyExpressionError, match="name has more than 1000"):
        Allowance().matches("x", "x" * 1001)


def test_an_allowance_is_for_all_calls_together():
    allowance = Allowance(total=0.3, each=0.1)
    start = time.thread_time()
    for _ in range(50):
        with pytest.raises(CostlyExpressionError):
            allowance.matches("(a|aa)+$", A)
    assert time.thread_time() - start < 1.5
    with pytest.raises(CostlyExpressionError):
        allowance.matches("a", "a")
    with pytest.raises(CostlyExpressionError):
        Allowance(total=1).spend(2)


def test_the_engine_is_imported_only_for_expressions():
    code = (
        "import sys\nimport loratools as lt\nfrom loratools.adapters import Selection\n"
        "import loratools.formats.peft.config as config\n"
        "Selection(('layers.{1-2}.*',)).selected(['layers.1.q'])\n"
        "config.matched({'a.q': 4, r'^a\\.q': 2}, 'b.a.q', 8, field='')\n"
        "assert 'regex' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
