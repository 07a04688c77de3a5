import hashlib
import importlib
import json
import os
import subprocess
import sys

import pytest

from loratools.engine.cards import card, is_generated
from loratools.engine.events import Stage, Started
from loratools.errors import (
    AccessError,
    InputDataError,
    InputMissingError,
    MismatchError,
    UnsupportedError,
    UsageError,
)
from loratools.verbs.pull import pull
from loratools.verbs.push import plan_push, push
from tests.hub_emulator import HubEmulator
from tests.hub_routes import Blob

SECRET = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
REPORT = {"schema": "loratools/extract/1", "loratools": "0.1.0", "inputs": [], "parameters": {}, "modules": []}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubEmulator() as emulator:
        emulator.install(monkeypatch, tmp_path / "home")
        yield emulator


@pytest.fixture
def adapter(tmp_path):
    """A directory as our verbs leave it."""
    path = tmp_path / "adapter"
    path.mkdir()
    files = {
        "adapter_config.json": b'{"base_model_name_or_path": "org/base"}\n',
        "adapter_model.safetensors": bytes(range(256)) * 20,
        "README.md": card(REPORT, base_model="org/base").encode(),
    }
    for name, data in files.items():
        (path / name).write_bytes(data)
    rows = [{"name": n, "bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()]
    (path / "loratools.json").write_text(json.dumps({**REPORT, "files": rows}))
    return path


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_everything_arrives_in_one_commit(hub, adapter):
    events = []
    report = push(adapter, "me/a", listener=events.append)
    repo = hub.repos["me/a"]
    assert repo.files() == contents(adapter)
    assert len(repo.trees) == 2  # the repository's own first commit, and ours
    assert not repo.private
    assert (report.commit, report.changed, report.pull_request) == (repo.refs["main"], True, None)
    assert Started("push", 4, sum(map(len, contents(adapter).values()))) in events
    assert events[-1] == Stage("reading back")
    assert all(line.token is None for line in hub.log if line.host == "localhost")
    assert hub.requests("PUT /lfs/")


def test_the_report_is_json_without_paths_or_token(hub, adapter):
    document = push(adapter, "me/a", private=True, message="hello").to_json()
    assert hub.repos["me/a"].private
    assert hub.repos["me/a"].titles[document["commit"]] == "hello"
    assert document["schema"] == "loratools/push/1"
    assert document["url"] == f"{hub.url}/me/a"
    assert document["created"] == ["repository"]
    assert [(row["name"], row["already_there"]) for row in document["files"]] == [
        (n, False) for n in sorted(contents(adapter))
    ]
    assert document["files"][2]["sha256"] == hashlib.sha256(contents(adapter)["adapter_model.safetensors"]).hexdigest()
    assert str(adapter.parent) not in json.dumps(document)
    assert hub.token not in json.dumps(document)


def test_a_second_run_commits_nothing_and_says_so(hub, adapter):
    first = push(adapter, "me/a")
    hub.log.clear()
    second = push(adapter, "me/a")
    assert (second.commit, second.changed) == (first.commit, False)
    assert any("already there" in note for note in second.to_json()["notes"])
    assert all(row["already_there"] for row in second.to_json()["files"])
    assert not hub.requests("POST .*(commit|preupload|create)|PUT")


def test_only_what_changed_is_sent(hub, adapter):
    push(adapter, "me/a")
    (adapter / "extra.txt").write_text("more")
    report = push(adapter, "me/a")
    assert [file.name for file in report.plan.upload] == ["extra.txt"]
    assert hub.repos["me/a"].files() == contents(adapter)
    assert len(hub.requests("PUT /lfs/")) == 1


def test_the_plan_only_reads(hub, adapter):
    plan = plan_push(adapter, "me/a", private=True)
    document = plan.to_json()
    assert (document["schema"], document["verb"]) == ("loratools/plan/1", "push")
    assert (document["creates"], document["private"], document["parent"]) == (["repository"], True, None)
    assert document["upload_bytes"] == sum(map(len, contents(adapter).values()))
    assert hub.repos == {}
    assert {line.method for line in hub.log} == {"GET"}


def test_the_card_is_the_users_to_edit(hub, adapter):
    (adapter / "README.md").write_text("# Mine\n")
    push(adapter, "me/a")
    assert hub.repos["me/a"].files()["README.md"] == b"# Mine\n"


def test_a_card_written_on_the_hub_is_kept(hub, adapter):
    """A generated card replaces a generated one, never a text that somebody wrote; the user's own replaces both."""
    push(adapter, "me/a")
    repo = hub.repos["me/a"]
    other = card({**REPORT, "notes": ["new"]}, base_model=None)
    assert is_generated(other)
    (adapter / "README.md").write_text(other)
    push(adapter, "me/a")
    assert repo.files()["README.md"].decode() == other
    repo.commit("main", {"README.md": Blob(b"# By hand\n", lfs=False)})
    report = push(adapter, "me/a")
    assert not report.changed
    assert repo.files()["README.md"] == b"# By hand\n"
    assert ("README.md", "the one in the repository was written by hand and is kept") in report.plan.left_out
    (adapter / "README.md").write_text("# Mine\n")
    push(adapter, "me/a")
    assert repo.files()["README.md"] == b"# Mine\n"


def test_a_text_too_large_to_search_is_named(hub, adapter):
    (adapter / "tokenizer.json").write_text(" " * (1 << 20) + SECRET)
    assert any("tokenizer.json" in note for note in plan_push(adapter, "me/a").notes)


def test_what_is_not_published_is_named(hub, adapter):
    (adapter / "training_args.bin").write_bytes(b"x")
    (adapter / ".secret").write_bytes(b"x")
    (adapter / "x.partial").write_bytes(b"x")
    (adapter / "runs").mkdir()
    os.mkfifo(adapter / "pipe")
    report = push(adapter, "me/a")
    names = {"training_args.bin", ".secret", "x.partial", "runs", "pipe"}
    assert {name for name, _ in report.plan.left_out} == names
    assert {row["name"] for row in report.to_json()["left_out"]} == names
    assert not names & set(hub.repos["me/a"].files())


def test_what_cannot_be_pushed(hub, adapter, tmp_path):
    (tmp_path / "many").mkdir()
    for index in range(101):
        (tmp_path / "many" / f"{index}.txt").write_text("")
    with pytest.raises(UnsupportedError, match="101"):
        push(tmp_path / "many", "me/a")
    with pytest.raises(InputMissingError):
        push(tmp_path / "nothing", "me/a")
    for options in ({"create_pr": True, "revision": "x"}, {"message": " "}, {"revision": "a b"}):
        with pytest.raises(UsageError):
            push(adapter, "me/a", **options)
    with pytest.raises(UsageError):
        push(adapter, "noowner")
    assert hub.log == []


def test_nothing_is_sent_of_a_directory_that_leaks_or_is_not_what_its_report_says(hub, adapter):
    (adapter / "notes.txt").write_text(SECRET)
    with pytest.raises(InputDataError, match=r"notes\.txt"):
        push(adapter, "me/a")
    (adapter / "notes.txt").unlink()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(MismatchError, match=r"adapter_config\.json"):
        push(adapter, "me/a")
    assert hub.log == []


def test_a_pull_request_leaves_main_alone_and_is_found_again(hub, adapter):
    hub.repo("org/theirs", {"config.json": b"{}"})
    main = hub.repos["org/theirs"].refs["main"]
    first = push(adapter, "org/theirs", create_pr=True)
    repo = hub.repos["org/theirs"]
    assert first.pull_request == f"{hub.url}/org/theirs/discussions/1"
    assert repo.refs["main"] == main
    assert contents(adapter).items() <= repo.files("refs/pr/1").items()
    second = push(adapter, "org/theirs", create_pr=True)
    assert (second.pull_request, second.commit, second.changed) == (first.pull_request, first.commit, False)
    assert len(repo.pulls) == 1
    (adapter / "more.txt").write_text("x")
    third = push(adapter, "org/theirs", create_pr=True)
    assert (third.pull_request, third.changed) == (f"{hub.url}/org/theirs/discussions/2", True)


def test_a_pull_request_can_be_continued(hub, adapter):
    hub.repo("me/a", {"config.json": b"{}"})
    push(adapter, "me/a", create_pr=True)
    (adapter / "more.txt").write_text("x")
    push(adapter, "me/a", revision="refs/pr/1")
    assert hub.repos["me/a"].files("refs/pr/1")["more.txt"] == b"x"
    assert "more.txt" not in hub.repos["me/a"].files()
    with pytest.raises(InputMissingError):
        push(adapter, "me/a", revision="refs/pr/7")


def test_a_branch_is_made_where_it_is_missing(hub, adapter):
    report = push(adapter, "me/a", revision="dev")
    assert report.plan.creates == ("repository", "branch")
    assert hub.repos["me/a"].files("dev") == contents(adapter)
    assert hub.repos["me/a"].files("main") == {}
    assert not push(adapter, "me/a", revision="dev").changed


def test_who_may_not_write_is_told_so(hub, adapter, monkeypatch):
    hub.repo("org/theirs", {"config.json": b"{}"})
    for name in ("org/theirs", "org/new"):
        with pytest.raises(AccessError, match="not permitted"):
            push(adapter, name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessError, match="Log in"):
        push(adapter, "me/a")
    assert hub.repos["org/theirs"].files() == {"config.json": b"{}"}


def test_pushing_works_without_torch(hub, adapter):
    code = (
        "import sys; sys.modules['torch'] = None; from loratools.verbs.push import push; "
        "report = push(sys.argv[1], 'me/a'); print(report.commit)"
    )
    environment = {**os.environ, **hub.environment(adapter.parent / "home2")}
    done = subprocess.run(
        [sys.executable, "-c", code, adapter], env=environment, text=True, capture_output=True, check=True
    )
    assert done.stdout.strip() == hub.repos["me/a"].refs["main"]
    assert hub.token not in done.stdout + done.stderr


JUDGE = """
import sys, torch
from peft import PeftModel
model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 3, bias=False)})
torch.nn.init.zeros_(model.q_proj.weight)
model.forward = lambda x: model.q_proj(x)
loaded = PeftModel.from_pretrained(model, sys.argv[1])
print(loaded(torch.eye(4)).T.tolist())
"""


def test_peft_loads_what_push_published(hub, tmp_path):
    """PEFT itself, in another process, gets the adapter from the repository by its name: ΔW = 2 B A."""
    pytest.importorskip("peft")
    numpy, save_file = importlib.import_module("numpy"), importlib.import_module("safetensors.numpy").save_file
    A, B = numpy.arange(8, dtype="f4").reshape(2, 4), numpy.arange(6, dtype="f4").reshape(3, 2)
    made = tmp_path / "peft"
    made.mkdir()
    prefix = "base_model.model.q_proj.lora_"
    save_file({f"{prefix}A.weight": A, f"{prefix}B.weight": B}, made / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (made / "adapter_config.json").write_text(json.dumps(config))
    push(made, "me/peft")
    command = [sys.executable, "-W", "ignore", "-c", JUDGE, "me/peft"]
    environment = {**os.environ, **hub.environment(tmp_path / "home3")}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == (2 * B @ A).tolist()
    assert [line for line in hub.requests("GET /cdn/") if line.token is None]
    pull("me/peft", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(made)
