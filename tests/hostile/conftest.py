"""The inputs of the hostile tests."""

import pytest
import torch

from loratools.verbs.merge import merge
from tests.tiny import Q, llama, normal, write_adapter, write_checkpoint


def tuned():
    tensors = llama()
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"] + normal(7, 16, 16, dtype=torch.bfloat16)
    return tensors


@pytest.fixture
def home(tmp_path):
    """A base in shards, a tuned checkpoint, an adapter, and what it was merged into."""
    write_checkpoint(tmp_path / "base", shards=2)
    write_checkpoint(tmp_path / "tuned", tuned())
    write_adapter(tmp_path / "a")
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "bare", receipt="none")
    return tmp_path
