import inspect
import re

import pytest

from loratools import errors
from loratools.errors import LoratoolsError, printable

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, LoratoolsError)]


def drawn():
    """Class → parent, from the tree in the module's docstring."""
    found, stack = {}, []
    for line in errors.__doc__.splitlines():
        name = re.search(r"(\w+(?:Error))\b", line)
        if not name or not re.match(r"\s*(LoratoolsError$|[│ ]*[├└]──)", line):
            continue
        depth = name.start()
        while stack and stack[-1][0] >= depth:
            stack.pop()
        found[name[1]] = stack[-1][1] if stack else "Exception"
        stack.append((depth, name[1]))
    return found


def test_the_tree_in_the_docstring_is_the_tree():
    """Every class with its parent, and none besides."""
    assert drawn() == {each.__name__: each.__bases__[0].__name__ for each in CLASSES}
    for line in errors.__doc__.splitlines():
        if builtin := re.search(r"(\w+Error) \((\w+)\)", line):
            assert getattr(errors, builtin[1]).__bases__[1].__name__ == builtin[2]


def test_every_class_has_a_code_of_its_own():
    """Machines tell errors apart by it."""
    codes = [each.code for each in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_an_error_is_one_paragraph():
    """What, where, what to do; whitespace folded."""
    error = errors.MalformedError(
        "The header\n  is broken.", fix="Download it again.", file="a.safetensors", shape=(2, 3)
    )
    assert str(error) == "The header is broken. (file a.safetensors, shape (2, 3)) Download it again."
    assert str(errors.UsageError("No.")) == "No."


HOSTILE = [
    "\x1b[31mred",
    "a\nb",
    "a\rb",
    "a\tb",
    "\x00",
    "\u202egnp.exe",
    "\u200b",
    "\x9b2J",
    "\ud800",
    "\ufeff",
    "a" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_strangers_are_safe_to_print(text):
    """No control, format, surrogate or unassigned character reaches a terminal, and no megabyte."""
    shown = str(errors.MismatchError("Bad.", tensor=text, fix="Do."))
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", shown)
    assert len(shown) < 1500
    shown.encode("utf-8")


def test_printable_keeps_what_is_harmless():
    """Letters of every script, accents, emoji, spaces."""
    for text in ("model.layers.0", "Größe 層 🙂 naïve", "a b"):
        assert printable(text) == text
    assert printable("a\nb") == "a\\nb"
    assert printable(7) == "7"
    assert printable("x" * 300) == "x" * 200 + "…"


def test_the_json_form():
    """Code, message, where as text, fix; values escaped there too."""
    error = errors.NonFiniteError("NaN.", fix="Stop.", tensor="a\x1b", count=3)
    assert error.to_json() == {
        "code": "non-finite",
        "message": "NaN. (tensor a\\x1b, count 3) Stop.",
        "where": {"tensor": "a\\x1b", "count": "3"},
        "fix": "Stop.",
    }


def test_builtin_relatives():
    """`except ValueError` and friends catch what they should."""
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.InputMissingError, FileNotFoundError)
    assert issubclass(errors.AccessError, PermissionError)
    assert issubclass(errors.StorageError, OSError)
    with pytest.raises(FileNotFoundError, match=r"not there.*x"):
        raise errors.InputMissingError("It is not there.", path="x")
