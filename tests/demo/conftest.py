"""Stand-ins for the public verbs: an SVD by torch, and files in the same places."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.demo.adapt import ADAPTER_NAME, Verbs
from loratools.demo.networks import WEIGHTS_NAME, one_thread


@dataclasses.dataclass(frozen=True)
class FakeReport:
    document: dict[str, object]

    def to_json(self):
        return self.document


def fake_extract(base, tuned, output, /, *, rank):
    old, new = load_file(base / WEIGHTS_NAME), load_file(tuned / WEIGHTS_NAME)
    factors = {}
    for name, weight in old.items():
        with one_thread():  # a busy second core slows BLAS tenfold
            U, S, Vh = torch.linalg.svd(new[name] - weight, full_matrices=False)
        factors[f"{name}.lora_A"] = Vh[:rank].contiguous()
        factors[f"{name}.lora_B"] = (U[:, :rank] * S[:rank]).contiguous()
    output.mkdir()
    save_file(factors, output / ADAPTER_NAME)
    return FakeReport({})


def fake_merge(base, adapters, output):
    merged = load_file(base / WEIGHTS_NAME)
    for adapter in adapters:
        factors = load_file(adapter / ADAPTER_NAME)
        for name in merged:
            merged[name] = merged[name] + factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
    output.mkdir()
    save_file(merged, output / WEIGHTS_NAME)
    shutil.copy(base / WEIGHTS_NAME, output / "receipt")
    return FakeReport({})


def fake_unmerge(merged, output, *, adapters, base):
    output.mkdir()
    shutil.copy(merged / "receipt", output / WEIGHTS_NAME)
    return FakeReport({})


def fake_inspect(source):
    (path,) = Path(source).glob("*.safetensors")
    return FakeReport({"parameters": sum(tensor.numel() for tensor in load_file(path).values())})


@pytest.fixture(scope="session")
def fake_verbs():
    return Verbs(extract=fake_extract, merge=fake_merge, unmerge=fake_unmerge, inspect=fake_inspect)
