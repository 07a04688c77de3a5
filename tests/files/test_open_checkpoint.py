"""What opening a checkpoint says about what it leaves aside."""

import torch
from safetensors.torch import save_file

from loratools.files import open_checkpoint


def test_what_is_left_aside_is_named(tmp_path):
    """Folders and weights in another form are named in a note; companions and hidden files are not."""
    save_file({"a.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / ".hidden").write_text("", encoding="utf-8")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.notes == ("Not part of the checkpoint, and not copied: 1_Pooling/, pytorch_model.bin.",)
    assert [path.name for path in checkpoint.companions] == ["tokenizer.json"]


def test_nothing_left_aside_nothing_said(tmp_path):
    """A plain directory gives no note."""
    save_file({"a.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).notes == ()
