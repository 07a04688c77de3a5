"""Every verb on small inputs, and what a refusal must be."""

import json
import re

import pytest

from loratools.errors import LoratoolsError
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests.tiny import state

VERBS = {
    "extract": lambda home, out, **run: extract(home / "base", home / "tuned", out, rank=2, **run),
    "merge": lambda home, out, **run: merge(home / "base", [home / "a"], out, **run),
    "recast": lambda home, out, **run: merge(home / "base", [], out, dtype="fp32", **run),
    "subtract": lambda home, out, **run: unmerge(home / "bare", out, adapters=[home / "a"], **run),
    "restore": lambda home, out, **run: unmerge(home / "merged", out, base=home / "base", **run),
    "stack": lambda home, out, **run: stack([home / "a", home / "a"], out, **run),
    "rescale": lambda home, out, **run: rescale(home / "a", out, by=2, **run),
}
READS = {
    "extract": "base", "merge": "a", "recast": "base", "subtract": "bare", "restore": "base", "stack": "a",
    "rescale": "a",
}  # fmt: skip


def refuses(home, run, error, *parts):
    """`run` raises exactly `error`; its text is one printable paragraph with every part; the disk is as it was."""
    before = state(home)
    with pytest.raises(LoratoolsError) as caught:
        run()
    text = str(caught.value)
    assert type(caught.value) is error, text
    for part in parts:
        assert re.search(part, text), (part, text)
    assert "\n" not in text
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert text.endswith((".", ")", "?"))
    assert len(text) < 1500
    assert json.loads(json.dumps(caught.value.to_json()))["message"] == text
    assert state(home) == before
    return text
