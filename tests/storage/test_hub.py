import importlib
import subprocess
import sys

import pytest

from loratools.errors import AccessError, HubError, InputMissingError, MalformedError, StorageError, UsageError
from loratools.storage import hub as hub_module
from loratools.storage import hub_files
from loratools.storage.hub import open_repository
from tests.hub_emulator import HubEmulator

WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": b"{}\n", "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubEmulator() as emulator:
        emulator.install(monkeypatch, tmp_path / "home")
        yield emulator


def fetched(hub, tmp_path, name="model.safetensors"):
    repository = open_repository("me/a")
    commit = repository.resolve()
    repository.download(repository.files(commit)[name], commit, tmp_path / "got")
    return (tmp_path / "got" / name).read_bytes()


def test_importing_the_module_and_the_verbs_loads_neither_the_client_nor_torch():
    code = (
        "import sys, loratools.storage.hub, loratools.verbs.push, loratools.verbs.pull;"
        "print(sorted({'huggingface_hub', 'torch', 'httpx', 'httpx2'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("name", ["me/model", "me/a.b_c-1", "_/x"])
def test_repository_names_that_are_fine(name):
    hub_files.check_repo_id(name, owner=True)


@pytest.mark.parametrize(
    "name",
    ["", "model", "a/b/c","../x", "a/..", "a/b--c", "a/b.git", "-a/b", "a/b-", "a b/c", "ä/b", "a/" + "x" * 96],
)  # fmt: skip
def test_repository_names_that_are_refused(name):
    with pytest.raises(UsageError):
        hub_files.check_repo_id(name, owner=True)


def test_an_owner_may_be_missing_where_that_is_allowed():
    hub_files.check_repo_id("gpt2", owner=False)


@pytest.mark.parametrize("revision", ["", "a..b", "a b", "a\n", "a?b"])
def test_revisions_that_are_refused(revision):
    with pytest.raises(UsageError):
        hub_files.check_revision(revision)


@pytest.mark.parametrize("revision", [None, "main", "refs/pr/3", "v1.0+x", "0" * 40])
def test_revisions_that_are_fine(revision):
    hub_files.check_revision(revision)


HOSTILE = [
    "../evil", "a/../../evil", "/etc/passwd", "a//b", "./a", "a/.", "C:/x", "c:x", "a\\b", "..\\evil", "\\\\host",
    "a\0b", "a\nb", "a\x1b[31mb", "a\u202eb", "", "a/", "x" * 256, "ü" * 128,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(name):
    with pytest.raises(MalformedError):
        hub_files.check_names([name])


def test_names_that_fold_together_are_refused():
    with pytest.raises(MalformedError):
        hub_files.check_names(["README.md", "readme.md"])
    hub_files.check_names(["a/b.json", "b.json", "ü.txt", "model-00001-of-00002.safetensors"])


@pytest.mark.parametrize("name", [".gitattributes", "a/.cache/b", "x.partial", "pytorch_model.bin", "a/x.CKPT", "o.pt"])
def test_what_is_left_out(name):
    assert hub_files.left_out_reason(name)


@pytest.mark.parametrize("name", ["README.md", "a/model.safetensors", "tokenizer.model", "loratools.receipt"])
def test_what_is_not_left_out(name):
    assert hub_files.left_out_reason(name) is None


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_means_that_nothing_is_sent(hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(HubError, match=variable):
        open_repository("me/a")
    assert hub.log == []


@pytest.mark.parametrize(
    "endpoint", ["http://hub.example.com", "https://user:secret@hub.example.com", "ftp://x", "nonsense"]
)
def test_the_token_is_not_sent_to_such_an_endpoint(hub, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UsageError) as caught:
        open_repository("me/a")
    assert "secret" not in str(caught.value)
    assert hub.token not in str(caught.value)


def test_the_root_of_the_transports_errors_is_found():
    client = importlib.import_module("huggingface_hub.utils").httpx
    assert hub_module._transport_error() is client.HTTPError


def test_what_is_missing_is_an_input_that_is_missing(hub):
    hub.repo("me/a", FILES)
    for name, revision in (("me/other", None), ("me/a", "no-branch")):
        with pytest.raises(InputMissingError, match="no such"):
            open_repository(name).resolve(revision)
    assert not open_repository("me/other").find().repository
    assert open_repository("me/a").find("no-branch") == hub_module.Head(True, None)


def test_what_is_closed_is_an_access_error(hub, monkeypatch):
    hub.repo("me/a", FILES)
    hub.repo("me/gated", FILES, gated=True)
    with pytest.raises(AccessError, match="terms"):
        open_repository("me/gated").resolve()
    with pytest.raises(AccessError, match="terms"):
        open_repository("me/gated").find()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "stolen" * 5)
    with pytest.raises(AccessError, match="credentials") as caught:
        open_repository("me/a").resolve()
    assert "stolen" not in str(caught.value)


def test_a_token_in_an_answer_does_not_get_into_the_message():
    assert "hf_abc" not in hub_module._said("bad token hf_abcdefghijklmnopqrstuvwxyz for you")


@pytest.mark.parametrize("kind", [500, 503, 429, "drop", 200])
def test_a_hub_that_is_down_is_a_hub_error(hub, kind):
    hub.repo("me/a", FILES)
    hub.fault("/api/models/me/a", kind=kind, times=99)
    with pytest.raises(HubError):
        open_repository("me/a").resolve()


def test_no_server_at_all_is_a_hub_error(monkeypatch, hub):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        open_repository("me/a").resolve()


def test_a_listing_is_read_to_its_last_page(hub):
    hub.page_size = 2
    hub.repo("me/a", {f"{index}.json": b"%d" % index for index in range(5)})
    repository = open_repository("me/a")
    assert len(repository.files(repository.resolve())) == 6
    assert len(hub.requests("/tree/")) == 3


@pytest.mark.parametrize("name", FILES)
def test_a_remote_file_knows_its_own_bytes_and_no_others(hub, tmp_path, name):
    hub.repo("me/a", FILES)
    repository = open_repository("me/a")
    remote = repository.files(repository.resolve())[name]
    assert (remote.sha256 is not None) == name.endswith("safetensors")
    path = tmp_path / name
    for data, same in ((FILES[name], True), (FILES[name][:-1] + b"!", False), (FILES[name] + b"!", False)):
        path.write_bytes(data)
        assert remote.holds(path) == same
        assert remote.same_as(hub_files.LocalFile.read(path)) == same


def test_the_token_never_reaches_the_host_of_the_large_files(hub, tmp_path):
    hub.repo("me/a", FILES)
    assert fetched(hub, tmp_path) == WEIGHTS
    there = [line for line in hub.log if line.host == "localhost"]
    assert there
    assert all(line.token is None for line in there)
    assert any(line.token for line in hub.log if line.host == "127.0.0.1")


@pytest.mark.parametrize(("name", "route"), [("model.safetensors", "GET /cdn/"), ("config.json", "GET .*/resolve/")])
def test_a_flipped_bit_is_noticed_and_fetched_again(hub, tmp_path, name, route):
    hub.repo("me/a", FILES)
    hub.fault(route, kind="bitflip")
    assert fetched(hub, tmp_path, name) == FILES[name]
    assert len(hub.requests(route)) == 2


def test_a_bit_that_stays_flipped_is_a_hub_error(hub, tmp_path):
    hub.repo("me/a", FILES)
    hub.fault("GET /cdn/", kind="bitflip", times=99)
    with pytest.raises(HubError, match=r"model\.safetensors"):
        fetched(hub, tmp_path)


@pytest.mark.parametrize("second", [None, "no-range"])
def test_a_body_that_breaks_off_is_completed(hub, tmp_path, monkeypatch, second):
    monkeypatch.setattr(importlib.import_module("huggingface_hub").constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.repo("me/a", FILES)
    hub.fault("GET /cdn/", kind="truncate")
    if second:
        hub.fault("GET /cdn/", nth=2, kind=second)
    assert fetched(hub, tmp_path) == WEIGHTS
    again = hub.requests("GET /cdn/")[1]
    assert again.headers["range"] == f"bytes={len(WEIGHTS) // 2}-"


def test_a_file_that_is_gone_is_missing(hub, tmp_path):
    hub.repo("me/a", FILES)
    repository = open_repository("me/a")
    with pytest.raises(InputMissingError, match="no such file"):
        repository.download(hub_files.RemoteFile("x.json", 1, "", None), repository.resolve(), tmp_path)


def test_a_disk_that_fails_is_not_the_hubs_fault():
    error = hub_module._translation(OSError(28, "No space left on device"), "Downloading", {})
    assert isinstance(error, StorageError)
    assert isinstance(hub_module._translation(ConnectionResetError(104, "reset"), "Downloading", {}), HubError)


def test_the_clients_progress_bars_are_off_only_meanwhile(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    tqdm = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(tqdm, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    tqdm.enable_progress_bars()
    with hub_module._quiet():
        assert tqdm.are_progress_bars_disabled()
    assert not tqdm.are_progress_bars_disabled()
