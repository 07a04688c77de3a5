"""The page on reliability says what the tests and their counts say."""

import ast
from pathlib import Path

from tests.reliability import render
from tests.reliability.promises import PROMISES

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_is_generated():
    """Run `python -m tests.reliability.render` after every change of the tests or of the counts."""
    assert render.PAGE.read_text(encoding="utf-8") == render.page()


def test_every_test_that_it_names_exists():
    """By file and function."""
    for promise in PROMISES:
        for test in promise.tests:
            path, name = test.split("::")
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_promises_are_told_apart():
    """Every one is there, once, with a proof."""
    wanted = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 20]
    assert [promise.key for promise in PROMISES] == [f"P{number}" for number in wanted]
    assert all(promise.proof and promise.tests for promise in PROMISES)


def test_the_index_leads_to_it():
    assert "(reliability.md)" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
