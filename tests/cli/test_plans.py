"""`--dry-run`: the plan as text and as JSON, and nothing written; what needs no torch does not import it."""

import json
import subprocess
import sys

import pytest

from loratools.cli.plans import plan as plan_text
from loratools.engine.plan import Plan

PLANNED = {
    "extract": ["extract", "base", "tuned", "-o", "out", "--rank", "2"],
    "merge": ["merge", "base", "adapter", "-o", "out", "--overwrite"],
    "recast": ["merge", "base", "-o", "out", "--dtype", "bf16", "--max-shard-size", "4KiB"],
    "file": ["merge", "base/model.safetensors", "adapter", "-o", "out.safetensors"],
    "unmerge": ["unmerge", "base", "adapter", "-o", "out"],
    "stack": ["stack", "adapter", "adapter", "-o", "out"],
    "stack by a method": ["stack", "adapter", "adapter", "-o", "out", "--method", "ties", "--rank", "2"],
    "resize": ["resize", "adapter", "-o", "out", "--budget", "20KB"],
    "rescale": ["rescale", "adapter", "-o", "out", "--by", "0.5"],
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_writes_nothing(name, run, workdir, tree):
    """Text on one screen: inputs, output, work, bounds, rules; no file appears or changes."""
    before = tree(workdir)
    result = run(*PLANNED[name], "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "nothing is written" in result.stdout
    for label in ("output", "work", "reads", "writes", "memory", "rule"):
        assert f"\n  {label} " in result.stdout
    assert len(result.stdout.splitlines()) < 24
    assert tree(workdir) == before


@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_as_json(name, run, workdir):
    """Schema loratools/plan/1; the plan survives the way through JSON, and says the same then."""
    result = run(*PLANNED[name], "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == "loratools/plan/1"
    assert Plan.from_json(document).to_json() == document
    assert "\n".join(plan_text(Plan.from_json(document))) + "\n" == run(*PLANNED[name], "--dry-run").stdout


def test_a_plan_refuses_what_the_run_would(run, workdir):
    """An output that is there is exit 73 in a dry run too."""
    assert run("merge", "base", "adapter", "-o", "tuned", "--dry-run").exit_code == 73


def test_rules_that_decide_nothing_here_are_not_shown(run, workdir):
    """An extraction of matrices and norms says nothing of added rows."""
    shown = run(*PLANNED["extract"], "--dry-run").stdout
    assert "identical:" in shown
    assert "low-rank:" in shown
    assert "rows:" not in shown


LIGHT = [
    ["--help"],
    ["--version"],
    ["inspect", "base"],
    ["inspect", "adapter", "--json"],
    ["graph", "base"],
    *([*PLANNED[name], "--dry-run"] for name in PLANNED),
    ["push", "adapter", "me/x", "--dry-run"],
    ["pull", "me/x", "-o", "out"],
]


def test_no_torch_where_nothing_is_computed(workdir):
    """One process runs them all; afterwards torch is not there."""
    code = f"""
import json, sys
from loratools.cli.main import main
codes = []
for arguments in json.loads({json.dumps(json.dumps(LIGHT))}):
    try:
        main.main(arguments)
    except SystemExit as leaving:
        codes.append(leaving.code)
    if "torch" in sys.modules:
        sys.exit(f"{{arguments}} imported torch")
print("CODES", json.dumps(codes))
"""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "PATH": "/usr/bin", "HOME": str(workdir), "HF_TOKEN": "hf_x"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("CODES")[1]) == [0] * (len(LIGHT) - 2) + [69, 69]
