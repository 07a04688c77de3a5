"""H65: an adapter that is given twice is merged twice, and that is said."""

import shutil

import pytest

from loratools.engine.repeats import repeated
from loratools.verbs.merge import merge
from loratools.verbs.stack import stack
from tests.tiny import factors, lora_tensors, write_adapter, write_checkpoint


@pytest.fixture
def home(tmp_path):
    write_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    write_adapter(tmp_path / "b", lora_tensors(factors(seed=9)))
    write_adapter(tmp_path / "stronger", lora_alpha=16)
    return tmp_path


@pytest.mark.parametrize(("names", "said"), [
    (["a", "a"], ["a, a"]), (["a", "b", "copy"], ["a, copy"]), (["b", "b", "a", "a", "a"], ["b, b", "a, a, a"]),
    (["a", "b"], []), (["a", "stronger"], []),
])  # fmt: skip
def test_by_the_bytes_of_all_files(home, names, said):
    """Whatever the name; the same factors with another alpha are another adapter."""
    for report in (merge(home / "base", [home / name for name in names], home / "merged"),
                   stack([home / name for name in names], home / "stacked")):  # fmt: skip
        notes = [note for note in report.notes if "more than once" in note]
        assert [note.split(" as ")[1].split(":")[0] for note in notes] == said
    assert all(f"added {each.count(',') + 1} times" in note for each, note in zip(said, notes, strict=True))


def test_adapters_without_files_are_not_compared():
    """What was made in memory has no hashes."""
    entry = {"role": "adapter", "name": "x", "sha256": {}}
    assert repeated([entry, entry]) == ()
    assert repeated([{"role": "base", "name": "x", "sha256": {"f": "1"}}] * 2) == ()
