"""Three kinds of pairs of texts out of Python's own library, for adapters that learn one kind each.

`signatures`: a function's name and arguments, and the first sentence of its docstring. `comments`: a comment, and the
line of code below it. `prose`: two sentences that follow each other in the language reference (`pydoc_data.topics`), or
in a docstring below its first paragraph.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

Pair = tuple[str, str]

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
LEAST, MOST = 12, 200  # characters of a text
PARTS = ("train", "dev", "test")
_SHARES = (70, 15, 15)  # percent of the files, or topics


def pairs(task: str) -> dict[str, list[Pair]]:
    """Part → pairs; a file, or a topic, is in one part with all that is in it, and no first text comes twice."""
    found: dict[str, list[Pair]] = {part: [] for part in PARTS}
    seen: set[str] = set()
    for origin, one, other in TASKS[task]():
        texts = [" ".join(each.split()) for each in (one, other)]
        if all(LEAST <= len(each) <= MOST for each in texts) and seen.isdisjoint(texts):
            seen.update(texts)
            found[_part(origin)].append((texts[0], texts[1]))
    return {part: sorted(each, key=_number) for part, each in found.items()}


def _number(text: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(text).encode()).digest()[:8], "big")


def _part(origin: str) -> str:
    at = _number(origin) % 100
    return next(part for part, end in zip(PARTS, (_SHARES[0], sum(_SHARES[:2]), 100), strict=True) if at < end)


def _sources() -> Iterator[tuple[str, str]]:
    for path in sorted(LIBRARY.rglob("*.py")):
        name = path.relative_to(LIBRARY).as_posix()
        if not re.search(r"site-packages|(^|/)(test|tests|idlelib|lib2to3|pydoc_data|encodings)/", name):
            yield name, path.read_text(encoding="utf-8", errors="replace")


def _signatures() -> Iterator[tuple[str, str, str]]:
    for name, text in _sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                sentence = re.split(r"(?<=\.)\s|\n\s*\n", ast.get_docstring(node) or "")[0]
                yield name, f"{node.name}({ast.unparse(node.args)})", sentence


def _comments() -> Iterator[tuple[str, str, str]]:
    for name, text in _sources():
        lines = [line.strip() for line in text.splitlines()]
        for above, line in itertools.pairwise(lines):
            if above.startswith("# ") and line and not line.startswith("#"):
                yield name, above[2:], line


def _prose() -> Iterator[tuple[str, str, str]]:
    from pydoc_data import topics

    texts = list(topics.topics.items())
    for name, text in _sources():
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
        texts += [(name, doc.partition("\n\n")[2]) for doc in docs if doc]
    for name, text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            if re.match(r"\s|[*+=|>:-]", paragraph):
                continue
            sentences = re.split(r"(?<=\.)\s+(?=[A-Z])", paragraph)
            for one, other in itertools.pairwise(sentences):
                yield name, one, other


TASKS: dict[str, Callable[[], Iterator[tuple[str, str, str]]]] = {
    "signatures": _signatures,
    "comments": _comments,
    "prose": _prose,
}

if __name__ == "__main__":
    for task in TASKS:
        found = pairs(task)
        print(sys.version.split()[0], task, {part: len(each) for part, each in found.items()}, found["test"][:3])
