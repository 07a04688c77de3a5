import hashlib
import json
from pathlib import Path

import pytest

from loratools.engine.events import Started
from loratools.errors import HubError, InputMissingError, MalformedError, OutputExistsError, StorageError, UsageError
from loratools.storage import syscalls
from loratools.verbs.pull import plan_pull, pull
from tests.hub_emulator import HubEmulator
from tests.hub_routes import Blob

FILES = {
    "README.md": b"# Mine\n",
    "adapter_config.json": b"{}\n",
    "adapter_model.safetensors": bytes(range(256)) * 30,
    "vae/config.json": b'{"a": 1}\n',
    "empty.txt": b"",
}
LEFT_OUT = {"training_args.bin": b"pickle", "x/optimizer.pt": b"pickle", ".hidden": b""}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubEmulator() as emulator:
        emulator.install(monkeypatch, tmp_path / "home")
        emulator.repo("me/a", {**FILES, **LEFT_OUT})
        yield emulator


def tree(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_what_is_fetched_is_byte_identical_and_plain(hub, tmp_path):
    """Every file but the named ones arrives; no links, nothing of the client's."""
    events = []
    report = pull("me/a", tmp_path / "out", listener=events.append)
    assert tree(tmp_path / "out") == FILES
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["vae"]
    assert events[0] == Started("pull", 5, sum(map(len, FILES.values())))
    assert {event.target: event.nbytes for event in events[1:]} == {name: len(data) for name, data in FILES.items()}
    assert {file.name: file.sha256 for file in report.files} == {
        k: hashlib.sha256(v).hexdigest() for k, v in FILES.items()
    }
    assert all(file.path.read_bytes() == FILES[file.name] for file in report.files)


def test_the_report_names_the_commit_and_what_was_left_out(hub, tmp_path):
    document = pull("me/a", tmp_path / "out").to_json()
    assert document["schema"] == "loratools/pull/1"
    assert document["hub"] == f"me/a@{hub.repos['me/a'].refs['main']}"
    assert {row["name"] for row in document["left_out"]} == {*LEFT_OUT, ".gitattributes"}
    assert all(row["reason"] for row in document["left_out"])
    text = json.dumps(document)
    assert str(tmp_path) not in text
    assert hub.token not in text


def test_the_plan_writes_nothing(hub, tmp_path):
    document = plan_pull("me/a", tmp_path / "out").to_json()
    assert (document["schema"], document["verb"]) == ("loratools/plan/1", "pull")
    assert document["bytes"] == sum(map(len, FILES.values()))
    assert list(tmp_path.iterdir()) == []
    assert not hub.requests("resolve")


def test_a_revision_is_what_it_says(hub, tmp_path):
    repo = hub.repos["me/a"]
    old = repo.refs["main"]
    repo.commit("main", {"adapter_config.json": Blob(b"new", lfs=False)})
    pull("me/a", tmp_path / "old", revision=old)
    pull("me/a", tmp_path / "new")
    assert (tmp_path / "old" / "adapter_config.json").read_bytes() == b"{}\n"
    assert (tmp_path / "new" / "adapter_config.json").read_bytes() == b"new"


def test_a_branch_that_moves_meanwhile_does_not_mix_two_commits(hub, tmp_path):
    repo, blob = hub.repos["me/a"], Blob

    def move(_event):
        repo.commit("main", {name: blob(b"later", lfs=False) for name in FILES})

    pull("me/a", tmp_path / "out", listener=move)
    assert tree(tmp_path / "out") == FILES


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "C:evil", "evil\nname", "a//b"]
)
def test_a_hostile_name_stops_everything(hub, tmp_path, name):
    hub.repo("me/evil", {"config.json": b"{}", name: b"!"})
    (tmp_path / "deep").mkdir()
    with pytest.raises(MalformedError):
        pull("me/evil", tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]
    assert not hub.requests("resolve")


@pytest.mark.parametrize("kind", ["bitflip", "truncate", "drop", 503, 404])
@pytest.mark.parametrize("route", ["GET /cdn/", "GET /me/a/resolve/.*README"])
def test_a_download_that_keeps_failing_leaves_nothing(hub, tmp_path, kind, route):
    hub.fault(route, kind=kind, times=99)
    with pytest.raises((HubError, InputMissingError)):
        pull("me/a", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bitflip", "truncate", "drop", 503])
def test_every_single_fault_leaves_nothing_or_the_whole(hub, tmp_path, kind):
    """One fault at the K-th request, for every K: the output is complete or absent, and a second run completes it."""
    pull("me/a", tmp_path / "plain")
    count = len(hub.log)
    completed = 0
    for index in range(1, count + 1):
        out = tmp_path / str(index)
        hub.faults.clear()
        hub.fault(".", nth=index, kind=kind)
        try:
            pull("me/a", out)
            completed += 1
        except (HubError, InputMissingError):
            assert not out.exists()
            pull("me/a", out)
        assert tree(out) == FILES
    assert completed
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_exists_is_kept_unless_told(hub, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(OutputExistsError):
        pull("me/a", out)
    assert hub.log == []
    pull("me/a", out, overwrite=True)
    assert tree(out) == FILES


def test_a_disk_that_is_too_small_is_noticed_before_the_download(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(syscalls, "free_bytes", lambda _path: 1000)
    with pytest.raises(StorageError, match="full"):
        pull("me/a", tmp_path / "out")
    assert not hub.requests("resolve")


def test_a_repository_of_pickles_has_nothing_for_us(hub, tmp_path):
    hub.repo("me/pickles", LEFT_OUT)
    with pytest.raises(InputMissingError, match="nothing"):
        pull("me/pickles", tmp_path / "out")


def test_what_is_not_there_is_missing(hub, tmp_path):
    for name, revision in (("me/nothing", None), ("me/a", "nothing")):
        with pytest.raises(InputMissingError):
            pull(name, tmp_path / "out", revision=revision)
    with pytest.raises(UsageError):
        pull("../x", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_output_is_made_where_we_are(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = pull("me/a", "out")
    assert tree(Path("out")) == FILES
    assert all(file.path.is_absolute() for file in report.files)
