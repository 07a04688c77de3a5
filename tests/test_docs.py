"""The documentation says what the tool does: its commands are run, its pages and names exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def commands(page):
    """Lines that start with `$`, without their comments."""
    for block in CONSOLE.findall(page.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if line.startswith("$ "):
                yield shlex.split(line[2:], comments=True)


@pytest.fixture
def workdir(tmp_path):
    """A directory with a tiny Llama-shaped `base` and a `tuned` that differs in matrices and norms."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(48, 24, generator=generator)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}self_attn.q_proj.weight"] = torch.randn(24, 24, generator=generator)
        tensors[f"{prefix}mlp.up_proj.weight"] = torch.randn(40, 24, generator=generator)
        tensors[f"{prefix}input_layernorm.weight"] = torch.ones(24)
    tensors["model.norm.weight"] = torch.ones(24)
    tensors["lm_head.weight"] = torch.randn(48, 24, generator=generator)
    config = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": false}'
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config, encoding="utf-8")
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        tensors = {
            key: value if "embed" in key else value + 0.01 * torch.randn(value.shape, generator=generator)
            for key, value in tensors.items()
        }
    return tmp_path


def run(arguments, folder):
    """Run one documented command as a user would."""
    assert arguments[0] == "loratools"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "tutorial.md"], ids=lambda page: page.name)
def test_documented_commands_run_in_order(page, workdir):
    """Every console line of the README and the tutorial succeeds, one after the other, on a checkpoint pair."""
    lines = list(commands(page))
    assert len(lines) >= 8
    for arguments in lines:
        if arguments[1] == "push":
            continue  # needs a Hub; tests/verbs/test_push.py runs it against one
        done = run(arguments, workdir)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), arguments


def test_readme_python_runs(workdir):
    """The README's Python lines run after its commands and give what their comments say."""
    for arguments in commands(ROOT / "README.md"):
        if arguments[1] in {"extract", "rescale"}:
            assert run(arguments, workdir).returncode == 0
    (code,) = PYTHON.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workdir,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tensors" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every relative link of every page names a file that is there."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_documented_commands_have_pages():
    """Every command has a guide page that names it, and the index links all of them."""
    from loratools.cli.main import COMMANDS

    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        page = ROOT / "docs" / "guide" / f"{name}.md"
        assert f"loratools {name}" in page.read_text(encoding="utf-8")
        assert f"guide/{name}.md" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_options_exist(page):
    """Every `--option` that a page mentions is one that some command has."""
    import click

    from loratools.cli.main import COMMANDS, main

    context = click.Context(main)
    known = {"--version", "--help"}
    for name in COMMANDS:
        command = main.get_command(context, name)
        known |= {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    foreign = {"--index-url", "--durations", "--only", "--runs", "--peers", "--work", "--sides", "--warm-up", "--check"}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    assert mentioned <= known | foreign, mentioned - known - foreign
