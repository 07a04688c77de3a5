"""The command line, run in this process and in one of its own; a tiny checkpoint pair to run it on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from loratools.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}


def tensors(seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (32, 16)}
    for layer in (0, 1):
        shapes |= {f"model.layers.{layer}.self_attn.q_proj.weight": (16, 16)}
        shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (24, 16)}
    shapes |= {"model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_checkpoint(directory, weights):
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def write_adapter(directory, seed=5, rank=2):
    generator = np.random.default_rng(seed)
    factors = {}
    for name, weight in tensors().items():
        if "layers" in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{path}.lora_A.weight"] = generator.standard_normal((rank, weight.shape[1])).astype(np.float32)
            factors[f"{path}.lora_B.weight"] = generator.standard_normal((weight.shape[0], rank)).astype(np.float32)
    directory.mkdir(parents=True)
    save_file(factors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps({**ADAPTER, "r": rank}))
    return directory


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    base = tensors()
    step = np.random.default_rng(9)
    tuned = {name: weight + 0.1 * step.standard_normal(weight.shape).astype(np.float32) if weight.ndim == 2 else weight
             for name, weight in base.items()}  # fmt: skip
    write_checkpoint(folder / "base", base)
    write_checkpoint(folder / "tuned", tuned)
    write_adapter(folder / "adapter")
    return folder


@pytest.fixture
def workdir(originals, tmp_path, monkeypatch):
    """The working directory: `base`, `tuned` and `adapter`."""
    folder = tmp_path / "workdir"
    shutil.copytree(originals, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run():
    """`run("merge", "base", …)` in this process; has `exit_code`, `stdout`, `stderr`."""

    def call(*arguments, env=None):
        result = CliRunner(env=env).invoke(main, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return call


def environment(**more):
    cleaned = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    return {**cleaned, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TERM": "xterm", **more}


@pytest.fixture
def shell():
    """`shell("merge", "base", …)` in a process of its own."""

    def call(*arguments, env=None, **options):
        return subprocess.run(
            [sys.executable, "-m", "loratools", *map(str, arguments)],
            env=environment(**(env or {})), text=True, check=False, timeout=60,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )  # fmt: skip

    return call


@pytest.fixture
def tree():
    """Everything below a directory: relative path → bytes."""

    def read(folder):
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
                for path in sorted(Path(folder).rglob("*"))}  # fmt: skip

    return read
