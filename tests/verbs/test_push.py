import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratools.engine.cards import card, is_generated
from loratools.errors import (
    AccessError,
    HubError,
    InputDataError,
    InputMissingError,
    LoratoolsError,
    MalformedError,
    MismatchError,
    UnsupportedError,
    UsageError,
)
from loratools.storage import hub as hub_module
from loratools.verbs.pull import pull
from loratools.verbs.push import plan_push, push

sys.path.insert(0, str(Path(__file__).parents[1]))
HubEmulator = importlib.import_module("hub_emulator").HubEmulator
Blob = importlib.import_module("hub_routes").Blob

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
    report = push(adapter, "me/a", events=events.append)
    repo = hub.repos["me/a"]
    assert repo.files() == contents(adapter)
    assert len(repo.trees) == 2  # the repository's own first commit, and ours
    assert not repo.private
    assert (report.commit, report.changed, report.pull_request) == (repo.refs["main"], True, None)
    assert [(event.verb, event.done, event.total) for event in events] == [("push", 4, 4)]
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


def test_the_plan_and_a_dry_run_only_read(hub, adapter):
    plan = plan_push(adapter, "me/a", private=True)
    document = plan.to_json()
    assert (document["schema"], document["verb"]) == ("loratools/plan/1", "push")
    assert (document["creates"], document["private"], document["parent"]) == (["repository"], True, None)
    assert document["upload_bytes"] == sum(map(len, contents(adapter).values()))
    report = push(adapter, "me/a", dry_run=True)
    assert (report.commit, report.changed, report.plan.upload) == (None, False, plan.upload)
    assert hub.repos == {}
    assert {line.method for line in hub.log} == {"GET"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_is_not_what_the_report_says_is_not_sent(hub, adapter, name):
    data = bytearray((adapter / name).read_bytes())
    data[5] ^= 1
    (adapter / name).write_bytes(data)
    with pytest.raises(MismatchError, match=name):
        push(adapter, "me/a")
    (adapter / name).unlink()
    with pytest.raises(MismatchError, match=name):
        push(adapter, "me/a")
    assert hub.log == []


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"files": 1}', '{"files": [1]}', '{"files": [{"name": "a"}]}', "no json"]
)
def test_a_report_that_is_none_is_refused(hub, adapter, text):
    (adapter / "loratools.json").write_text(text)
    with pytest.raises(MalformedError, match=r"loratools\.json"):
        push(adapter, "me/a")


def test_the_card_is_the_users_to_edit(hub, adapter):
    (adapter / "README.md").write_text("# Mine\n")
    push(adapter, "me/a")
    assert hub.repos["me/a"].files()["README.md"] == b"# Mine\n"


def test_a_card_written_on_the_hub_is_kept(hub, adapter):
    """The generated card replaces a generated one, never a text that somebody wrote; the user's own text replaces both."""
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


SECRETS = [
    SECRET,
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "-----BEGIN RSA " + "PRIVATE KEY-----",
    "-----BEGIN " + "PRIVATE KEY-----",
    "ghp_" + "a1B2" * 9,
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "trainer_state.json", "notes.txt"])
def test_a_secret_is_not_published_nor_shown(hub, adapter, secret, name):
    (adapter / name).write_text(f"one\ntwo {secret}\n")
    with pytest.raises(InputDataError) as caught:
        push(adapter, "me/a")
    assert name in str(caught.value)
    assert "line 2" in str(caught.value)
    assert secret not in json.dumps(caught.value.to_json())
    assert hub.log == []


PATHS = [
    ("README.md", "see /home/alice/x"), ("README.md", "C:\\Users\\alice"), ("notes.md", "file:///Users/alice/x"),
    ("config.json", '{"_name_or_path": "/data/llama"}'), ("adapter_config.json", '{"base_model_name_or_path": "./base"}'),
    ("adapter_config.json", '{"base_model_name_or_path" :"C:\\\\models\\\\x"}'), ("README.md", "---\nbase_model: /data/x\n---"),
    ("README.md", '---\ntags:\n- "base_model:adapter:/data/x"\n---'), ("generation_config.json", '{"a": "/root/x"}'),
    ("loratools.json", '{"files": [], "a": "/home/alice/x"}'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), PATHS)
def test_a_path_of_this_machine_is_not_published(hub, adapter, name, text):
    (adapter / "loratools.json").unlink()
    (adapter / name).write_text("\n" + text)
    with pytest.raises(InputDataError, match="path of this machine") as caught:
        push(adapter, "me/a")
    assert "alice" not in str(caught.value)
    assert hub.log == []


def test_what_only_looks_like_a_path_or_secret_is_published(hub, adapter):
    (adapter / "loratools.json").unlink()
    (adapter / "README.md").write_text("https://x.org/home/foo hf_hub_download_file_with_long_name s3.com/Users/x")
    (adapter / "vocab.json").write_text('{"/home/alice": 1}')
    (adapter / "config.json").write_text('{"_name_or_path": "org/base", "chat": "~/x"}')
    push(adapter, "me/a")
    assert hub.repos["me/a"].files() == contents(adapter)


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


def test_links_inside_are_followed_and_links_out_are_refused(hub, adapter, tmp_path):
    (adapter / "copy.txt").symlink_to("adapter_config.json")
    push(adapter, "me/a")
    assert hub.repos["me/a"].files()["copy.txt"] == (adapter / "adapter_config.json").read_bytes()
    (tmp_path / "outside.txt").write_text("x")
    for target in (tmp_path / "outside.txt", "/etc/passwd", "nowhere", "loop.txt"):
        (adapter / "loop.txt").unlink(missing_ok=True)
        (adapter / "loop.txt").symlink_to(target)
        with pytest.raises(InputDataError, match=r"loop\.txt"):
            push(adapter, "me/a")


def test_what_cannot_be_pushed(hub, adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "pickles" / "config.json").write_text("{}")
    (tmp_path / "many").mkdir()
    for index in range(101):
        (tmp_path / "many" / f"{index}.txt").write_text("")
    for path, error in (
        (tmp_path / "nothing", InputMissingError), (tmp_path / "empty", InputMissingError),
        (adapter / "README.md", UsageError), (tmp_path / "pickles", UnsupportedError), (tmp_path / "many", UnsupportedError),
    ):  # fmt: skip
        with pytest.raises(error):
            push(path, "me/a")
    for options in ({"create_pr": True, "revision": "x"}, {"message": " "}, {"revision": "a b"}):
        with pytest.raises(UsageError):
            push(adapter, "me/a", **options)
    with pytest.raises(UsageError):
        push(adapter, "noowner")
    os.rename(adapter / "README.md", adapter / "a\nb")
    with pytest.raises(MalformedError):
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


@pytest.mark.parametrize("kind", [503, "drop", "drop-after", "truncate"])
def test_main_is_old_or_new_at_every_fault(hub, adapter, kind):
    """One fault at the K-th request, for every K: main holds the old tree or the whole new one; a second run completes it."""
    old, new = {"config.json": b"{}", "adapter_config.json": b"old"}, contents(adapter)
    whole, seen = {**old, **new}, set()
    hub.repo("me/0", old)
    push(adapter, "me/0")
    count = len(hub.log)
    assert count > 8
    for index in range(1, count + 1):
        repo = hub.repo(f"me/{index}", old)
        hub.objects.clear()
        hub.faults[:] = []
        hub.fault(".", nth=index, kind=kind)
        try:
            push(adapter, repo.name)
            assert repo.files() == whole
            seen.add("survived")
        except LoratoolsError as error:
            assert repo.files() in (old, whole)
            assert hub.token not in str(error)
            seen.add("failed")
        push(adapter, repo.name)
        assert repo.files() == whole
        assert len(repo.trees) == 3  # the repository's first, the old one, and exactly one of ours
    assert seen == {"survived", "failed"}


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
