"""What a Hub that fails, or that others use meanwhile, does to `push`."""

import pytest

from loratools.errors import HubError, LoratoolsError
from loratools.storage import hub as hub_module
from loratools.verbs.push import push
from tests.hub_emulator import HubEmulator
from tests.hub_routes import Blob


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubEmulator() as emulator:
        emulator.install(monkeypatch, tmp_path / "home")
        yield emulator


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 20)
    (path / "README.md").write_text("# Mine\n")
    return path


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_branch_that_moved_meanwhile_is_not_overwritten(hub, adapter, monkeypatch):
    push(adapter, "me/a")
    (adapter / "more.txt").write_text("x")
    commit = hub_module.HubRepository.commit

    def slow(self, *args, **options):
        hub.repos["me/a"].commit("main", {"theirs.txt": Blob(b"theirs", lfs=False)})
        return commit(self, *args, **options)

    monkeypatch.setattr(hub_module.HubRepository, "commit", slow)
    with pytest.raises(HubError, match="meanwhile"):
        push(adapter, "me/a")
    assert "more.txt" not in hub.repos["me/a"].files()
    monkeypatch.undo()


def test_a_lost_answer_is_found_by_looking(hub, adapter):
    hub.repo("me/a")
    hub.fault("POST .*/commit/", kind="drop-after")
    report = push(adapter, "me/a")
    assert report.changed
    assert "found by reading" in report.to_json()["notes"][-1]
    assert report.commit == hub.repos["me/a"].refs["main"]
    assert len(hub.repos["me/a"].trees) == 2


def test_a_lost_answer_to_a_pull_request_is_found_too(hub, adapter):
    hub.repo("me/a")
    hub.fault("POST .*/commit/", kind="drop-after")
    report = push(adapter, "me/a", create_pr=True)
    assert report.pull_request.endswith("/discussions/1")
    assert len(hub.repos["me/a"].pulls) == 1


def test_a_commit_that_did_not_arrive_is_said_not_to_have(hub, adapter):
    hub.repo("me/a")
    hub.fault("POST .*/commit/", kind="drop")
    with pytest.raises(HubError, match="Nothing was committed"):
        push(adapter, "me/a")
    assert hub.repos["me/a"].files() == {}


def test_a_commit_of_which_nobody_knows_is_called_unknown(hub, adapter):
    repo = hub.repo("me/a")
    hub.fault("POST .*/commit/", kind="drop-after")
    hub.fault("GET /api/models/me/a$", nth=2, kind="drop", times=99)
    with pytest.raises(HubError, match="not known"):
        push(adapter, "me/a")
    hub.faults.clear()
    assert not push(adapter, "me/a").changed
    assert len(repo.trees) == 2


def test_somebody_elses_commit_is_not_taken_for_ours(hub, adapter, monkeypatch):
    repo = hub.repo("me/a")
    hub.fault("POST .*/commit/", kind="drop")
    find = hub_module.HubRepository.find

    def moved(self, revision=None):
        if hub.requests("POST .*/commit/"):
            repo.commit("main", {"theirs.txt": Blob(b"theirs", lfs=False)})
        return find(self, revision)

    monkeypatch.setattr(hub_module.HubRepository, "find", moved)
    with pytest.raises(HubError, match="Nothing was committed"):
        push(adapter, "me/a")


def test_what_the_hub_dropped_is_noticed_when_reading_back(hub, adapter):
    hub.ignored.add("adapter_config.json")
    with pytest.raises(HubError, match=r"adapter_config\.json"):
        push(adapter, "me/a")


def test_what_the_hub_holds_wrongly_is_noticed_when_reading_back(hub, adapter):
    hub.repo("me/a")
    hub.fault("POST .*/paths-info/", kind="bitflip")
    with pytest.raises(HubError):
        push(adapter, "me/a")


def test_a_card_that_the_hub_refuses_is_a_hub_error(hub, adapter):
    (adapter / "README.md").write_text("---\nlicense: invented\n---\n")
    with pytest.raises(HubError, match="license") as caught:
        push(adapter, "me/a")
    assert "Nothing was committed" not in str(caught.value)


def attempt(adapter, name):
    """The error of a push, or None."""
    try:
        push(adapter, name)
    except LoratoolsError as error:
        return error
    return None


@pytest.mark.parametrize("times", [1, 999])
@pytest.mark.parametrize("kind", [503, "drop", "drop-after", "truncate"])
@pytest.mark.parametrize("old", [None, {"config.json": b"{}", "adapter_config.json": b"old"}])
def test_main_is_old_or_new_at_every_fault(hub, adapter, old, kind, times):
    """A fault at the K-th request, or at all that follow, for every K: main is old or new, and a re-run ends it."""
    whole, seen = {**(old or {}), **contents(adapter)}, set()
    if old:
        hub.repo("me/0", old)
    push(adapter, "me/0")
    count = len(hub.log)
    assert count > 8
    for index in range(1, count + 1):
        name = f"me/{index}"
        if old:
            hub.repo(name, old)
        hub.objects.clear()
        hub.fault(".", nth=index, kind=kind, times=times)
        error = attempt(adapter, name)
        now = hub.repos[name].files() if name in hub.repos else {}
        seen.add(error is None)
        assert now == whole or (error is not None and now == (old or {}))
        assert hub.token not in str(error)
        hub.faults.clear()
        assert attempt(adapter, name) is None
        assert hub.repos[name].files() == whole
        assert len(hub.repos[name].trees) == (3 if old else 2)  # of ours, exactly one
    assert seen == ({True, False} if times == 1 else {False})
