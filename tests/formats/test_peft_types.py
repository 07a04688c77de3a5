"""Every kind of adapter that the installed PEFT has is read, or refused by name with its reason."""

import json

import pytest

from loratools import load_adapter
from loratools.errors import UnsupportedError
from loratools.formats.peft.tuners import REFUSED, TUNERS
from tests import tiny


def test_the_table_is_complete():
    """A kind that a new PEFT adds shows here: write its tuner, or say in `refused.py` why there is none."""
    from peft import PeftType

    assert {kind.value for kind in PeftType} == {*TUNERS, *REFUSED}


def test_nothing_is_both_read_and_refused():
    """A kind that is read has no line in `refused.py` any more."""
    assert not TUNERS.keys() & REFUSED.keys()


@pytest.mark.parametrize("kind", [*REFUSED, "NOVEL"])
def test_refused_by_name(tmp_path, kind):
    """The type, and the reason where there is one."""
    adapter = tiny.write_adapter(tmp_path / "adapter", config=json.dumps({"peft_type": kind}))
    with pytest.raises(UnsupportedError) as caught:
        load_adapter(adapter)
    assert kind in str(caught.value)
    assert REFUSED.get(kind, "not read yet") in str(caught.value)
