"""What merges that are gone on with start from."""

import pytest
import torch

from loratools.engine import resuming
from tests.tiny import factors, llama, lora_tensors, write_adapter, write_checkpoint


@pytest.fixture
def every_unit(monkeypatch):
    """Each unit is recorded as soon as it is done."""
    monkeypatch.setattr(resuming, "BATCH_SECONDS", 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_checkpoint(home / "base", llama(torch.float32), shards=3, companions={"tokenizer.json": b"{}"})
    write_checkpoint(home / "one", llama())
    write_adapter(home / "a")
    write_adapter(home / "b", lora_tensors(factors(3, 2)), r=3)
    return home
