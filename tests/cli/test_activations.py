"""`extract --activations` on the command line: text, JSON, exit codes, and a dry run without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.imatrix_files import gguf

NAME = "blk.0.attn_q.weight"


@pytest.fixture
def tuned(workdir):
    """Besides the fixture's files, an importance matrix of one matrix."""
    entries = {NAME: (np.arange(1, 17, dtype="<f4").reshape(1, 16), [4.0])}
    (workdir / "imatrix.gguf").write_bytes(gguf(entries))
    return workdir


def test_text_and_json(run, tuned):
    """The note counts what is weighted; the document has both residuals and the input's hash."""
    result = run("extract", "base", "tuned", "-o", "out", "--rank", "2", "--activations", "imatrix.gguf")
    assert result.exit_code == 0
    assert "modules are weighted by the activations of imatrix.gguf" in " ".join(result.stdout.split())
    result = run("extract", "base", "tuned", "-o", "two", "--rank", "2", "--activations", "imatrix.gguf", "--json")
    document = json.loads(result.stdout)
    rows = {row["name"]: row for row in document["modules"]}
    row = rows["model.layers.0.self_attn.q_proj"]
    assert 0 < row["weighted_residual"] < row["residual"]
    assert [each["name"] for each in document["inputs"] if each["role"] == "activations"] == ["imatrix.gguf"]


@pytest.mark.parametrize(("make", "code", "words"), [
    (lambda path: None, 66, "no such file"),
    (lambda path: path.write_bytes(gguf({NAME: (np.ones((1, 8), "<f4"), [1.0])})), 65, "another model"),
    (lambda path: path.write_bytes(gguf({"blk.8.attn_q.weight": (np.ones((1, 8), "<f4"), [1.0])})), 65, "names a m"),
    (lambda path: path.write_bytes(b"\x80\x04K\x01."), 65, "no importance matrix"),
    (lambda path: save_file({"\x1b[31mred": np.ones(3, "<f4")}, path), 65, "names a module"),
])  # fmt: skip
def test_refusals(run, workdir, tree, make, code, words):
    """One paragraph, its exit code, nothing written, nothing raw on the terminal; `--dry-run` says the same."""
    make(workdir / "act")
    before = tree(workdir)
    for more in ((), ("--dry-run",)):
        result = run("extract", "base", "tuned", "-o", "out", "--activations", "act", *more)
        assert result.exit_code == code
        assert words in result.stderr
        assert "\x1b" not in result.stderr
    assert tree(workdir) == before


def test_a_dry_run_needs_no_torch(tuned):
    """Which modules are weighted is decided from names, headers and a few numbers."""
    code = (
        "import sys\nfrom loratools.cli.main import main\n"
        "try:\n main(['extract', 'base', 'tuned', '-o', 'out', '--activations', 'imatrix.gguf', '--dry-run'])\n"
        "except SystemExit as end:\n assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tuned, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "imatrix.gguf: activations, 1 file" in done.stdout
