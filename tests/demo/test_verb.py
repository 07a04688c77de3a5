"""`loratools.verbs.demo`: where the files go, and what comes back."""

import json
import tempfile

import pytest

from loratools.demo import adapt as story
from loratools.demo.training import Recipe
from loratools.errors import OutputError, OutputExistsError, UsageError
from loratools.verbs import demo as verb


@pytest.fixture
def fake_world(monkeypatch, fake_verbs, tmp_path):
    """The stand-in verbs, little training, and a place for temporary files that can be looked into."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(verb, "_verbs", lambda: fake_verbs)
    monkeypatch.setattr(story, "FROM_SCRATCH", Recipe(epochs=1))
    monkeypatch.setattr(story, "FINE_TUNE", Recipe(epochs=1))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary


def test_without_output_nothing_is_left(fake_world, tmp_path):
    report = verb.demo()
    assert report.output is None
    assert report.result.restored
    assert not list(fake_world.iterdir())


def test_output_keeps_the_files(fake_world, tmp_path):
    (tmp_path / "place").mkdir()
    output = tmp_path / "place" / "story"
    report = verb.demo("adapt", output, seed=1)
    assert report.output == output
    names = {path.name for path in output.iterdir()}
    assert {"base", "tuned", "adapter-rank-1", "merged-rank-16", "restored-rank-16", "loratools.json"} <= names
    assert json.loads((output / "loratools.json").read_text(encoding="utf-8")) == report.to_json()
    assert [path.name for path in output.parent.iterdir()] == ["story"]
    assert not list(fake_world.iterdir())


def test_json_document(fake_world):
    document = verb.demo(seed=2).to_json()
    assert document["schema"] == "loratools/demo/1"
    assert document["story"] == "adapt"
    assert document["result"]["seed"] == 2
    json.dumps(document)


def test_output_that_is_there_is_refused(fake_world, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExistsError, match="taken"):
        verb.demo(output=tmp_path / "taken")


def test_output_below_a_file_is_refused(fake_world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a directory"):
        verb.demo(output=tmp_path / "file" / "story")


def test_unknown_story_is_refused(fake_world):
    with pytest.raises(UsageError, match="The demos are: adapt"):
        verb.demo("opera")


def test_failure_leaves_nothing(fake_world, tmp_path, monkeypatch):
    def interrupt(step):
        raise KeyboardInterrupt

    for output in (None, tmp_path / "story"):
        with pytest.raises(KeyboardInterrupt):
            verb.demo(output=output, on_event=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not list(fake_world.iterdir())
