"""Every file that the safetensors library takes is taken and reads the same; what is not is listed, with reasons."""

import itertools
import random
import re
from pathlib import Path

import pytest

from tests.reliability.counts import record, recorded
from tests.storage.differential import DIFFERENCES, IDS, LIBRARY, on_disk, sweep, theirs, verdict
from tests.storage.header_mutants import BITS, EDITS, mutants, valid, written
from tests.storage.storage_samples import entry, packed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats" / "safetensors.md"
SLOW_MUTANTS = 250_000

EXAMPLES = {
    "repeated-key": [
        packed(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0061":{"dtype":"F32","shape":[1],'
               b'"data_offsets":[0,4]}}', b"1234"),
        packed(b'{"__metadata__":{"a":"1","a":"2"}}'),
        packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":{"y":1,"y":1}}}', b"1234"),
    ],
    "leading-space": [packed(b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"), packed(b"\n{}")],
    "size-above-int64": [
        packed({"a": entry("U8", (0, 2**63), (0, 0))}), packed({"a": entry("U8", (2**64 - 1, 0), (0, 0))})
    ],
    "overflow-behind-zero": [packed({"a": entry("F32", (0, 2**62, 4), (0, 0))})],
    "entry-as-list": [packed(b'{"a":["F32",[1],[0,4]]}', b"1234")],
    "dtype-as-object": [packed({"a": entry({"F32": None})}, b"1234")],
}  # fmt: skip


def test_sampled_mutants(tmp_path):
    """Names, dtypes, shapes, offsets and bytes where both accept; a listed reason where only one does."""
    counts = sweep(mutants(0), 5000, tmp_path / "x.safetensors")
    assert counts.unintended == []
    assert counts.verdicts["accepted"] > 800
    assert counts.verdicts["refused"] > 2000
    assert len(set(IDS) & set(counts.verdicts)) >= 4
    assert {edit.__name__ for edit in EDITS} | {"bytewise", "none"} == set(counts.edits)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_mutants(tmp_path):
    counts = sweep(mutants(1), SLOW_MUTANTS, tmp_path / "x.safetensors")
    record("differential", counts.to_json())
    assert counts.unintended == []


def test_the_counts_that_are_kept_are_of_such_a_sweep():
    kept = recorded("differential")
    intended = kept["intended differences"]
    assert kept["mutants"] >= 200_000
    assert kept["unintended differences"] == 0
    assert list(intended) == sorted(IDS)
    assert all(intended.values())
    assert kept["both accept"] + kept["both refuse"] + sum(intended.values()) == kept["mutants"]


@pytest.mark.parametrize("name", IDS)
def test_a_difference_is_a_rule(name, tmp_path):
    """Examples of every one: the library takes them, so that the row is needed, and our refusal says which it is."""
    for file in EXAMPLES[name]:
        assert theirs(file) is not None, LIBRARY
        assert verdict(file) == name
        assert on_disk(tmp_path / "x.safetensors", file) is True


def test_only_what_is_shown_explains_a_refusal(monkeypatch):
    """Were our reader to refuse good files with the words of a difference, the sweep would say so."""
    good = packed({"a": entry()}, b"1234")
    assert verdict(good) == "accepted"
    monkeypatch.setattr("tests.storage.differential.ours", lambda file: "A JSON object has the same key twice.")
    assert verdict(good).startswith("only the library accepts")
    monkeypatch.setattr("tests.storage.differential.ours", lambda file: {"a": ("F32", (1,), b"1235")})
    assert "is not" in verdict(good)
    monkeypatch.setattr("tests.storage.differential.theirs", lambda file: None)
    assert verdict(good) == "only loratools accepts it"


def test_mutants_are_the_same_for_the_same_seed():
    assert list(itertools.islice(mutants(5), 300)) == list(itertools.islice(mutants(5), 300))


def test_every_dtype_of_the_library_is_known():
    """Both ways: a dtype that the library gained would show here."""
    for dtype, bits in BITS.items():
        size = 8 // bits if bits < 8 else 1
        size = 4 if bits == 6 else size
        file = packed({"a": entry(dtype, (size,), (0, size * bits // 8))}, bytes(size * bits // 8))
        assert verdict(file) == "accepted"


def test_the_page_has_the_list():
    """Row by row: what, who takes it, why; no row more, none less."""
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \| (.+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(each.id, each.what, f"the {each.accepts}", each.reason) for each in DIFFERENCES]


def test_valid_drafts_are_valid():
    """The edits start from files that both sides take."""
    chance = random.Random(9)
    for _ in range(200):
        assert verdict(written(valid(chance), chance)) == "accepted"
