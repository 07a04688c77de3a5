"""The page on combining adapters is what its stored result gives, and its texts are kept apart."""

import itertools
import json

import pytest

from tests.benchmarks import combining, combining_page
from tests.benchmarks.pairs import LEAST, MOST, PARTS, TASKS, pairs


def stored():
    return json.loads(combining_page.RESULT.read_text(encoding="utf-8"))


def test_the_page_is_what_the_result_gives():
    """Nobody types a number."""
    assert combining_page.PAGE.read_text(encoding="utf-8") == combining_page.page()


def test_the_result_has_every_method_for_every_seed():
    document = stored()
    assert [each["seed"] for each in document["seeds"]] == list(combining.SEEDS)
    assert all(set(each["methods"]) == set(combining.METHODS) for each in document["seeds"])
    assert all(set(each["alone"]) == set(TASKS) for each in document["seeds"])


def test_every_adapter_learned_its_own_task():
    """Else there is nothing to keep: each is better than the base where it was trained, on texts it has not seen."""
    for seed in stored()["seeds"]:
        for task in TASKS:
            assert seed["alone"][task][task] < seed["base"][task]


def test_what_is_kept_counts_from_the_base_to_the_adapter_of_each_task():
    base, own = {"a": 2.0, "b": 5.0}, {"a": 1.0, "b": 3.0}
    assert combining.mean_share(own, base, own) == 1
    assert combining.mean_share(base, base, own) == 0
    assert combining.mean_share({"a": 1.5, "b": 6.0}, base, own) == pytest.approx((0.5 - 0.5) / 2)


@pytest.mark.parametrize("task", ["prose"])
def test_no_text_is_in_two_parts(task):
    found = pairs(task)
    assert min(len(found[part]) for part in PARTS) >= max(combining.JUDGED.values())
    texts = {part: set(itertools.chain(*found[part])) for part in PARTS}
    assert not any(texts[one] & texts[other] for one, other in itertools.combinations(PARTS, 2))
    assert all(LEAST <= len(text) <= MOST for text in itertools.chain(*texts.values()))
    assert found == pairs(task)
