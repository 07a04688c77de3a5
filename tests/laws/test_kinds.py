"""The grid of kinds is complete: nothing that can be in an adapter escapes the laws."""

import pytest

from loratools.formats.peft.tuners import TUNERS
from tests import models
from tests.laws.kinds import EVERY_KIND, final_kinds, held_classes


def test_every_update_class_has_an_entry():
    """A new kind fails here until `tests/laws/kinds.py` builds one of it."""
    built = set().union(*(held_classes(update) for kind in EVERY_KIND.values() for update in kind.adapter().values()))
    missing = sorted(each.__name__ for each in final_kinds() - built)
    assert missing == [], "add these kinds to EVERY_KIND in tests/laws/kinds.py"


def test_every_tuner_has_an_entry(tmp_path):
    """And every `peft_type` that is read, until one is written by it."""
    written = set()
    for name, kind in EVERY_KIND.items():
        written.add(models.config_of(kind.write(tmp_path / name))["peft_type"])
    missing = sorted(set(TUNERS) - written)
    assert missing == [], "add kinds that these tuners hold to EVERY_KIND in tests/laws/kinds.py"


@pytest.mark.parametrize("name", EVERY_KIND)
def test_two_seeds_are_two_adapters(tmp_path, name):
    """The grid would be idle if its adapters were all one."""
    kind = EVERY_KIND[name]
    one, two = (models.factors_of(kind.write(tmp_path / str(seed), seed)) for seed in (1, 2))
    assert one.keys() == two.keys()
    assert all(not one[key].equal(two[key]) for key in one)
