import json

import pytest

from loratools.errors import InputMissingError, MalformedError, UnsupportedError
from loratools.files import load_adapter, locate, open_checkpoint
from loratools.verbs.merge import merge
from tests.tiny import write_adapter, write_checkpoint


def test_kinds_of_directories_and_files(tmp_path):
    """By names in a directory; a single file by its own name and its neighbours."""
    base, adapter = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    shards = write_checkpoint(tmp_path / "shards", shards=2)
    assert locate.kind_of(base) == locate.kind_of(base / "model.safetensors") == "checkpoint"
    assert locate.kind_of(shards) == locate.kind_of(str(shards / "model.safetensors.index.json")) == "checkpoint"
    assert locate.kind_of(adapter) == locate.kind_of(adapter / "adapter_model.safetensors") == "adapter"
    lone = tmp_path / "x.safetensors"
    lone.write_bytes((base / "model.safetensors").read_bytes())
    assert locate.kind_of(lone) == "checkpoint"


def test_a_directory_with_both_is_named_and_its_files_can_be_taken(tmp_path):
    """The advice to name the weights file works for either."""
    both = write_checkpoint(tmp_path / "both")
    for path in write_adapter(tmp_path / "a").iterdir():
        (both / path.name).write_bytes(path.read_bytes())
    for operation in (locate.kind_of, open_checkpoint):
        with pytest.raises(MalformedError, match="checkpoint and an adapter"):
            operation(both)
    assert locate.kind_of(both / "model.safetensors") == "checkpoint"
    assert locate.kind_of(both / "adapter_model.safetensors") == "adapter"
    assert "model.norm.weight" in open_checkpoint(both / "model.safetensors")
    assert len(load_adapter(both / "adapter_model.safetensors")) == 3


def test_several_adapters_are_named_and_selectable(tmp_path):
    """PEFT saves all but the default adapter in sub-directories."""
    home = tmp_path / "home"
    write_adapter(home / "first")
    write_adapter(home / "second", r=4, lora_alpha=1)
    for operation in (load_adapter, locate.kind_of):
        if operation is locate.kind_of:
            assert operation(home) == "adapter"
            continue
        with pytest.raises(MalformedError, match=r"2 adapters: first, second.*home/first"):
            operation(home)
    assert load_adapter(home / "second")["model.layers.0.self_attn.q_proj"].alpha == 1
    assert load_adapter(home / "first").name == "first"
    write_adapter(tmp_path / "x")
    for path in (tmp_path / "x").iterdir():
        path.rename(home / path.name)
    assert load_adapter(home).name == "home"


def test_the_hub_is_refused_by_name(tmp_path):
    """Until it is read in place; the way round is said."""
    for operation in (load_adapter, open_checkpoint, locate.kind_of):
        with pytest.raises(UnsupportedError, match=r"hf://.*owner/name.*pull"):
            operation("hf://owner/name@main/sub")


def test_what_is_not_there_is_missing(tmp_path):
    """A path, a link to nothing, a name inside a file, an empty directory."""
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("nothing", "dangling", "empty", "file/inside"):
        for operation in (load_adapter, open_checkpoint):
            with pytest.raises(InputMissingError) as caught:
                operation(tmp_path / name)
            assert name.split("/")[0] in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"a": 1, "a": 2}', "null", "\x00", '"peft"', '{"r": NaN}', "[" * 100000]
)
def test_a_configuration_that_is_no_object_is_malformed(tmp_path, text):
    """H63: with the file's name; deep nesting does not end the interpreter."""
    adapter = write_adapter(tmp_path / "a")
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(MalformedError, match=r"adapter_config\.json"):
        load_adapter(adapter)


def test_a_configuration_that_is_a_directory_or_huge_is_refused(tmp_path):
    """H63: 64 MiB are enough for everybody."""
    adapter = write_adapter(tmp_path / "a")
    config = adapter / "adapter_config.json"
    with config.open("wb") as file:
        file.truncate(65 * 1024 * 1024)
    with pytest.raises(MalformedError, match=r"adapter_config\.json"):
        load_adapter(adapter)


def test_names_are_base_names(tmp_path, monkeypatch):
    """Also of `.` and of a path with a slash behind it."""
    adapter = write_adapter(tmp_path / "mine")
    monkeypatch.chdir(adapter)
    assert load_adapter(".").name == "mine"
    assert load_adapter(f"{adapter}/").name == "mine"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4


def test_a_report_on_a_large_model_is_read(tmp_path):
    """Rows as a merge writes them, 120 thousand of them: more than other documents may take."""
    base, adapter = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "merged")
    document = json.loads((tmp_path / "merged" / locate.REPORT_FILE).read_text())
    names = [f"model.layers.{at // 128}.mlp.experts.{at % 128}.gate_proj" for at in range(120_000)]
    document["modules"] = [{**document["modules"][0], "module": name} for name in names]
    row = next(iter(document["base"]["fingerprint"].values()))
    document["base"]["fingerprint"] = {f"{name}.weight": row for name in names}
    text = json.dumps(document)
    for directory in (tmp_path / "merged", adapter):
        (directory / locate.REPORT_FILE).write_text(text)
    assert len(open_checkpoint(tmp_path / "merged").report["modules"]) == 120_000
    assert load_adapter(adapter).provenance == document["base"]
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(MalformedError, match="bytes of memory"):
        load_adapter(adapter)
