"""What is printed where: text or one JSON document, quiet, colours, pipes, names that are hostile."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from loratools.cli.output import Output, safe
from loratools.cli.progress import bytes_done, steps_done
from loratools.engine.events import Advanced, Stage, Started

JSON_RUNS = {
    "extract": ["extract", "base", "tuned", "-o", "out", "--rank", "2"],
    "merge": ["merge", "base", "adapter", "-o", "out"],
    "stack": ["stack", "adapter", "adapter", "-o", "out"],
    "rescale": ["rescale", "adapter", "-o", "out", "--bake"],
    "resize": ["resize", "adapter", "-o", "out", "--rank", "1"],
    "unmerge": ["unmerge", "base", "adapter", "-o", "out"],
    "inspect": ["inspect", "adapter"],
    "graph": ["graph", "base"],
    "diff": ["diff", "base", "base", "--spectrum"],
}


@pytest.mark.parametrize("verb", JSON_RUNS)
def test_json_is_one_document(verb, run, workdir):
    """`--json`, before the command or after it: the report and nothing else, with its schema."""
    result = run(*JSON_RUNS[verb], "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["schema"] == f"loratools/{verb}/1"
    assert result.stdout.isascii()
    assert str(workdir) not in result.stdout
    overwrite = ["--overwrite"] if "-o" in JSON_RUNS[verb] else []
    assert json.loads(run("--json", *JSON_RUNS[verb], *overwrite).stdout) == json.loads(result.stdout)


def test_json_says_what_the_files_say(run, workdir):
    """The document of a verb that writes is its `loratools.json`."""
    document = json.loads(run(*JSON_RUNS["merge"], "--json").stdout)
    assert document == json.loads((workdir / "out" / "loratools.json").read_text())


@pytest.mark.parametrize("arguments", [["--json"], ["bogus", "--json"], ["merge", "--json"], ["--json", "merge", "-o"]])
def test_json_on_usage_errors(arguments, run):
    """Even where the command line itself cannot be read."""
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (2, "")
    assert json.loads(result.stdout)["error"]["code"] == "usage"


@pytest.mark.parametrize("arguments", [[*JSON_RUNS["merge"], "-q"], ["-q", *JSON_RUNS["merge"]]])
def test_quiet(arguments, run, workdir):
    """`-q` says nothing of what was done, but errors stay, and so does an answer that was asked for."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert (workdir / "out" / "model.safetensors").exists()
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (73, "")
    assert result.stderr
    assert run("inspect", "base", "-q").stdout == run("inspect", "base").stdout  # an answer, not a report of a run
    assert run("merge", "base", "adapter", "-o", "x", "-q").stdout == ""
    assert run(*arguments, "--overwrite", "--dry-run").stdout


def test_the_answer_of_diff(run, workdir):
    """Exit 0 the same, 1 not, either way in words and JSON; with `-q` in the exit code alone; refusals are none."""
    same, other = run("diff", "base", "base"), run("diff", "base", "tuned")
    assert (same.exit_code, other.exit_code) == (0, 1)
    assert (same.stderr, other.stderr) == ("", "")
    assert "changed" not in same.stdout
    assert "6 changed" in other.stdout
    for arguments, code in ((["base", "base"], 0), (["base", "tuned"], 1)):
        quiet = run("diff", *arguments, "-q")
        assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (code, "", "")
        document = run("diff", *arguments, "--json", "--spectrum", "--max-rank", "3")
        assert document.exit_code == code
        assert json.loads(document.stdout)["same"] is (code == 0)
        assert [row["rank"] for row in json.loads(document.stdout)["table"]] == ([] if code == 0 else [1, 2, 3])
    for refused in (["base", "adapter"], ["base", "tuned", "base"]):
        result = run("diff", *refused)
        assert (result.exit_code, result.stdout) == (65, "")
        assert result.stderr.count("\n") == 1


def test_graph_forms(run, workdir):
    """`--json` is `--as json`; the others are text."""
    assert json.loads(run("graph", "base", "--as", "json").stdout) == json.loads(run("graph", "base", "--json").stdout)
    assert "digraph" in run("graph", "base", "--as", "dot").stdout
    assert run("graph", "base", "--as", "mermaid").stdout
    assert "q_proj" in run("graph", "base").stdout
    assert "q_proj" not in run("graph", "base", "--depth", "1").stdout


def test_inspect_modules(run, workdir):
    """`--modules` names every module."""
    assert "model.layers.1.mlp.up_proj" in run("inspect", "adapter", "--modules").stdout


def on_terminal(arguments, **environment):
    """A process whose standard error is a terminal: its exit code, what it printed, what the terminal showed."""
    ours, theirs = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    process = subprocess.Popen(
        [sys.executable, "-m", "loratools", *arguments],
        env={**clean, "TERM": "xterm", **environment}, stdout=subprocess.PIPE, stderr=theirs, text=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    printed, _ = process.communicate()
    return process.returncode, printed, shown.decode()


def test_colour_on_a_terminal_only():
    """An error is red on a terminal, unless NO_COLOR."""
    code, _, shown = on_terminal(["bogus"])
    assert code == 2
    assert "\x1b[31m" in shown
    _, _, shown = on_terminal(["bogus"], NO_COLOR="1")
    assert shown == "error: No such command 'bogus'. See `loratools --help`.\r\n"


def test_progress_on_a_terminal_only(workdir):
    """The bar is drawn on standard error if that is a terminal, and nowhere else."""
    code, printed, shown = on_terminal(JSON_RUNS["merge"])
    assert code == 0
    assert "\x1b[" in shown
    assert "\x1b" not in printed
    assert printed.startswith("Merged")


def test_who_sees_progress(monkeypatch):
    """A terminal that can; not with `-q`."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", type("Terminal", (), {"isatty": lambda self: True})())
    assert Output().progress
    assert not Output(quiet=True).progress
    monkeypatch.setenv("TERM", "dumb")
    assert not Output().progress
    monkeypatch.setattr("sys.stderr", None)
    assert not Output().progress


def test_progress_takes_names_as_text():
    """What looks like markup in a name is drawn as it is; steps and bytes both reach the bar."""
    with bytes_done(shown=True) as listener, steps_done(shown=False) as silent:
        silent("x", 1, 2)
        for event in (Started("merge", 2, 10), Advanced(4, "[bold]a[/] \x1b[2J" + "x" * 100), Stage("verifying")):
            listener(event)
    with steps_done(shown=True) as step:
        step("[red]train[/]", 1, 2)


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}])
def test_pipes_get_plain_text(env, shell, workdir):
    """No escape sequence in a pipe, whatever the environment says; an ASCII console is served too."""
    done = shell(*JSON_RUNS["merge"], "--dry-run", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "one-rounding" in done.stdout


def test_hostile_names_are_escaped(run, workdir):
    """Terminal commands in a name, from a file or from the command line, arrive as text."""
    evil = "up\x1b[2J\x1b]0;owned\x07\u202e"
    result = run("inspect", evil)
    assert result.exit_code == 66
    assert "\\x1b[2J" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()
    (workdir / "adapter").rename(workdir / evil)
    result = run("merge", "base", evil, "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.replace("\n", "").isprintable()
    result = run("merge", "base", evil, "-o", "out2", "--dry-run", "--json")
    assert json.loads(result.stdout)["sources"][1]["name"] == evil
    result = run("merge", "base", "--\x1b[2J", "-o", "out3")
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr


def test_safe_keeps_lines_and_letters():
    assert safe("ΔW ≤ 1\n\tb") == "ΔW ≤ 1\n\tb"
    assert safe("a\x1b\r\u202e\udcff") == "a\\x1b\\r\\u202e\\udcff"


def test_a_reader_who_leaves(shell, workdir):
    """`loratools … | head`: no traceback, no complaint; standard output could not be written, exit 74."""
    reading, writing = os.pipe()
    os.close(reading)
    done = shell("inspect", "base", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (74, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["inspect", "base"], ["--help"], ["inspect", "base", "--json"]])
def test_a_full_disk_behind_standard_output(arguments, shell, workdir):
    """The answer could not be written: exit 74, and it says so once."""
    with Path("/dev/full").open("w") as full:
        done = shell(*arguments, stdout=full)
    assert done.returncode == 74
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == (0 if "--json" in arguments else 1)


def test_names_that_are_not_unicode(shell, workdir):
    """A path of arbitrary bytes works, and is printed escaped."""
    (workdir / "adapter").rename(workdir / os.fsdecode(b"caf\xe9"))
    done = shell("merge", "base", os.fsdecode(b"caf\xe9"), "-o", "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9" in done.stdout


def test_the_answer_of_diff_on_adapters(run, workdir):
    """Exit 0 the same, 1 not; more than two are a matrix and exit 0; the plan reads headers only."""
    assert run("rescale", "adapter", "-o", "twice", "--by", "2").exit_code == 0
    assert run("rescale", "adapter", "-o", "baked", "--bake").exit_code == 0
    for arguments, code in ((["adapter", "adapter"], 0), (["adapter", "baked"], 0), (["adapter", "twice"], 1)):
        result = run("diff", *arguments)
        assert (result.exit_code, result.stderr) == (code, "")
        assert json.loads(run("diff", *arguments, "--json").stdout)["same"] is (code == 0)
    assert "B is A at 2 times its weight." in run("diff", "adapter", "twice").stdout
    several = run("diff", "adapter", "twice", "baked")
    assert (several.exit_code, several.stderr) == (0, "")
    assert json.loads(run("diff", "adapter", "twice", "baked", "--json").stdout)["compared"] == "similarities"
    plan = run("diff", "adapter", "twice", "--dry-run")
    assert plan.exit_code == 0
    assert "writes" not in plan.stdout
    assert json.loads(run("diff", "adapter", "twice", "--dry-run", "--json").stdout)["schema"] == "loratools/plan/1"
    assert run("diff", "base", "tuned", "--max-memory", "10MB").exit_code == 71
