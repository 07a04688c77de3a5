import hashlib
import json
import os

import pytest

from loratools.errors import (
    InputDataError,
    InputMissingError,
    MalformedError,
    MismatchError,
    UnsupportedError,
    UsageError,
)
from loratools.storage.hub_files import LocalFile
from loratools.storage.outgoing import check_manifest, collect, refuse_leaks

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(300), "README.md": b"# x\n"}
SECRETS = [
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx",
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "-----BEGIN RSA " + "PRIVATE KEY-----",
    "-----BEGIN " + "PRIVATE KEY-----",
    "ghp_" + "a1B2" * 9,
]
PATHS = [
    ("README.md", "see /home/alice/x"),
    ("README.md", "C:\\Users\\alice"),
    ("notes.md", "file:///Users/alice/x"),
    ("config.json", '{"_name_or_path": "/data/llama"}'),
    ("adapter_config.json", '{"base_model_name_or_path": "./base"}'),
    ("adapter_config.json", '{"base_model_name_or_path" :"C:\\\\models\\\\x"}'),
    ("README.md", "---\nbase_model: /data/x\n---"),
    ("README.md", "---\nbase_model:\n- /data/x\n---"),
    ("README.md", '---\ntags:\n- "base_model:adapter:/data/x"\n---'),
    ("generation_config.json", '{"a": "/root/x"}'),
    ("loratools.json", '{"files": [], "a": "/home/alice/x"}'),
]
FINE = [
    ("README.md", "https://x.org/home/foo and s3.com/Users/x, hf_hub_download_file_with_long_name"),
    ("README.md", "---\nbase_model: ~\n---"),
    ("README.md", "---\nbase_model: org/base\n---\nabout base_model: a field"),
    ("vocab.json", '{"/home/alice": 1}'),
    ("config.json", '{"_name_or_path": "org/base", "chat": "~/x"}'),
    ("adapter_config.json", '{"base_model_name_or_path": "gpt2"}'),
    ("adapter_config.json", '{"base_model_name_or_path": null}'),
]


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    rows = [{"name": n, "bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in FILES.items()]
    (path / "loratools.json").write_text(json.dumps({"files": rows}))
    return path


def checked(directory):
    check_manifest(directory, [LocalFile.read(path) for path in collect(directory)[0]])


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "trainer_state.json", "notes.TXT"])
def test_a_secret_is_refused_and_not_shown(tmp_path, secret, name):
    (tmp_path / name).write_text(f"one\ntwo {secret}\n")
    with pytest.raises(InputDataError) as caught:
        refuse_leaks(tmp_path / name)
    assert name in str(caught.value)
    assert "line 2" in str(caught.value)
    assert secret not in json.dumps(caught.value.to_json())


@pytest.mark.parametrize(("name", "text"), PATHS)
def test_a_path_of_this_machine_is_refused_and_not_shown(tmp_path, name, text):
    (tmp_path / name).write_text("\n" + text)
    with pytest.raises(InputDataError, match="path of this machine") as caught:
        refuse_leaks(tmp_path / name)
    assert "alice" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), FINE)
def test_what_only_looks_like_a_path_or_a_secret_is_fine(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert refuse_leaks(tmp_path / name)


def test_whether_a_file_was_searched_is_said(tmp_path):
    (tmp_path / "tokenizer.json").write_text(" " * (1 << 20) + SECRETS[0])
    (tmp_path / "model.safetensors").write_text(SECRETS[0])
    assert not refuse_leaks(tmp_path / "tokenizer.json")
    assert refuse_leaks(tmp_path / "model.safetensors")


def test_files_that_are_what_the_report_says_pass(directory):
    checked(directory)
    (directory / "README.md").write_text("# edited\n")
    (directory / "extra.txt").write_text("more")
    checked(directory)
    (directory / "loratools.json").unlink()
    (directory / "adapter_config.json").write_text("{} ")
    checked(directory)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_is_not_what_the_report_says_is_named(directory, name):
    data = bytearray((directory / name).read_bytes())
    data[1] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(MismatchError, match=name):
        checked(directory)
    (directory / name).unlink()
    with pytest.raises(MismatchError, match=name):
        checked(directory)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"files": 1}', '{"files": [1]}', '{"files": [{"name": "a"}]}', "no json"]
)
def test_a_report_that_is_none_is_refused(directory, text):
    (directory / "loratools.json").write_text(text)
    with pytest.raises(MalformedError, match=r"loratools\.json"):
        checked(directory)


def test_everything_in_the_directory_is_collected_or_named(directory):
    for name in ("training_args.bin", ".secret", "x.partial"):
        (directory / name).write_bytes(b"x")
    (directory / "runs").mkdir()
    os.mkfifo(directory / "pipe")
    paths, left_out = collect(directory)
    assert {path.name for path in paths} == {*FILES, "loratools.json"}
    assert {name for name, reason in left_out if reason} == {
        "training_args.bin",
        ".secret",
        "x.partial",
        "runs",
        "pipe",
    }


def test_links_inside_are_followed_and_links_out_are_refused(directory, tmp_path):
    (directory / "copy.txt").symlink_to("adapter_config.json")
    assert "copy.txt" in {path.name for path in collect(directory)[0]}
    (tmp_path / "outside.txt").write_text("x")
    for target in (tmp_path / "outside.txt", "/etc/passwd", "nowhere", "link.txt"):
        (directory / "link.txt").unlink(missing_ok=True)
        (directory / "link.txt").symlink_to(target)
        with pytest.raises(InputDataError, match=r"link\.txt"):
            collect(directory)


def test_what_is_not_a_directory_of_weights_is_refused(directory, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "pickles" / "config.json").write_text("{}")
    for path, error in (
        (tmp_path / "nothing", InputMissingError),
        (tmp_path / "empty", InputMissingError),
        (directory / "README.md", UsageError),
        (tmp_path / "pickles", UnsupportedError),
    ):
        with pytest.raises(error):
            collect(path)
    (directory / "README.md").rename(directory / "a\nb")
    with pytest.raises(MalformedError):
        collect(directory)
