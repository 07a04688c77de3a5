import json

import pytest
import torch

from loratools.adapters import Adapter, LowRank
from loratools.adapters.adalora import AdaLora
from loratools.adapters.ia3 import Ia3
from loratools.errors import (
    LoratoolsError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from loratools.files import load_adapter, save
from loratools.storage.writer import SafetensorsWriter
from loratools.tensors import in_memory
from tests.tiny import K, Q, factors, lora_tensors, normal, state, write_adapter, write_checkpoint


def test_it_is_two_files_and_loads_back(tmp_path):
    """Weights and configuration only; ΔW bit for bit; the input as it was."""
    a = load_adapter(write_adapter(tmp_path / "a", lora_alpha=5))
    before = state(tmp_path)
    save(a, tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    b = load_adapter(tmp_path / "b")
    assert all(torch.equal(a[path].delta_weight(), b[path].delta_weight()) for path in a)
    assert {name: digest for name, digest in state(tmp_path).items() if not name.startswith("b")} == before


def test_an_existing_output_is_kept_or_replaced_whole(tmp_path):
    """Refused without `overwrite`; with it nothing of the old one is left."""
    a = load_adapter(write_adapter(tmp_path / "a"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    before = state(tmp_path)
    with pytest.raises(OutputExistsError, match="out"):
        save(a, out)
    assert state(tmp_path) == before
    save(a, out, overwrite=True)
    assert not (out / "precious").exists()
    assert [path for path in state(tmp_path) if "partial" in path] == []


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    """Atomic: at a failure in the last step the directory is as it was."""
    a = load_adapter(write_adapter(tmp_path / "a"))
    before = state(tmp_path)
    monkeypatch.setattr(SafetensorsWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(0.5 * a, tmp_path / "b")
    assert state(tmp_path) == before


def test_inputs_are_never_the_output(tmp_path):
    """Neither the adapter's own directory, nor that of one inside a sum, by whatever name."""
    a, b = load_adapter(write_adapter(tmp_path / "a")), load_adapter(write_adapter(tmp_path / "b"))
    (tmp_path / "link").symlink_to("b")
    before = state(tmp_path)
    for output in (tmp_path / "a", tmp_path / "b", tmp_path / "link", tmp_path / "b" / "inside"):
        with pytest.raises(OutputError):
            save(0.5 * a + b, output, overwrite=True)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["adapter-v0.2", "Llama-3.2-1B-lora", "x.y"])
def test_a_dot_in_the_name_is_a_name(tmp_path, name):
    """Model names are full of dots."""
    save(load_adapter(write_adapter(tmp_path / "a")), tmp_path / name)
    assert len(load_adapter(tmp_path / name)) == 3


def test_a_file_cannot_be_asked_for(tmp_path):
    """A PEFT adapter is a directory: no directory of that name is made."""
    a = load_adapter(write_adapter(tmp_path / "a"))
    before = state(tmp_path)
    with pytest.raises(UsageError, match=r"x\.safetensors"):
        save(a, tmp_path / "x.safetensors")
    assert state(tmp_path) == before


def test_formats_and_empty_adapters(tmp_path):
    """An unknown format and an adapter without a module are refused; nothing appears."""
    a = load_adapter(write_adapter(tmp_path / "a"))
    before = state(tmp_path)
    with pytest.raises(UsageError, match="klingon"):
        save(a, tmp_path / "b", format="klingon")
    with pytest.raises(UsageError, match="no module"):
        save(Adapter({}), tmp_path / "b")
    assert state(tmp_path) == before


def test_the_files_of_a_model_are_no_adapter(tmp_path):
    """Said with the first keys; a directory with a configuration and no weights is missing them."""
    base = write_checkpoint(tmp_path / "base")
    with pytest.raises(LoratoolsError, match=r"model\.embed_tokens"):
        load_adapter(base)
    adapter = write_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load_adapter(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnsupportedError, match="pickle"):
        load_adapter(adapter)


def test_what_a_config_names_is_not_touched(tmp_path):
    """H62: a model's own class may be named; it is not imported, and none of it is written again."""
    import sys

    extra = {"auto_mapping": {"parent_library": "a_model_of_mine", "base_model_class": "x"},
             "megatron_core": "megatron.core"}  # fmt: skip
    (tmp_path / "a_model_of_mine.py").write_text("raise SystemExit")
    a = load_adapter(write_adapter(tmp_path / "a", **extra))
    save(a, tmp_path / "b")
    assert not {"a_model_of_mine", "megatron"} & set(sys.modules)
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert not set(extra) & set(written)


def test_nan_factors_of_a_sum_are_not_spread(tmp_path):
    """Where numbers are computed, NaN is an error that names the tensor."""
    pairs = factors(modules={Q: (16, 16)})
    pairs[Q][0][1, 2] = float("nan")
    a = load_adapter(write_adapter(tmp_path / "a", lora_tensors(pairs)))
    b = load_adapter(write_adapter(tmp_path / "b", lora_tensors(factors(modules={Q: (16, 16)}, seed=3))))
    before = state(tmp_path)
    with pytest.raises(NonFiniteError, match=r"1 of 64.*q_proj\.lora_A"):
        save(0.7 * a + b, tmp_path / "c")
    assert state(tmp_path) == before


def made(name, seed, *shape):
    return in_memory(name, normal(seed, *shape))


def adalora_beside(other):
    """AdaLoRA of (16, 16) on one module, something else on another."""
    adaptive = AdaLora(
        lora_A=made("A", 1, 3, 16), lora_B=made("B", 2, 16, 3), lora_E=made("E", 3, 3, 1), alpha=5.0, ranknum=4
    )
    return Adapter({Q: adaptive, K: other})


def test_kinds_that_peft_keeps_apart_become_plain_lora_where_they_are_products(tmp_path):
    """ΔW as the formulas say it in float64: alpha / ranknum · B (A ⊙ E), and alpha / r · B A."""
    mixed = adalora_beside(LowRank(lora_A=made("A", 4, 2, 16), lora_B=made("B", 5, 8, 2), alpha=3.0))
    save(mixed, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    back = load_adapter(tmp_path / "out")
    adaptive, plain = mixed[Q], mixed[K]
    scaled = adaptive.lora_A.load().double() * adaptive.lora_E.load().double()
    expected = {
        Q: 5 / (4 + 1e-5) * adaptive.lora_B.load().double() @ scaled,
        K: 3 / 2 * plain.lora_B.load().double() @ plain.lora_A.load().double(),
    }
    for path, delta in expected.items():
        assert float((back[path].delta_weight() - delta).norm()) <= 1e-6 * float(delta.norm())


def test_a_kind_on_its_own_stays_what_it_is(tmp_path):
    alone = adalora_beside(None)
    save(alone.with_updates({Q: alone[Q]}), tmp_path / "out")
    assert load_adapter(tmp_path / "out")[Q].kind == "adalora"


def test_kinds_that_are_no_products_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"adalora, ia3 in one adapter\. Write the kinds as adapters of their own"
    ):
        save(adalora_beside(Ia3(ia3_l=made("l", 4, 8, 1), feedforward=False)), tmp_path / "out")
    assert state(tmp_path) == {}
