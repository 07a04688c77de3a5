"""The surface: which commands there are, what each takes, and what `--help` says about it."""

import json
import subprocess
import sys

import click
import pytest

from loratools.cli.main import COMMANDS, main

from_nothing = {"--json", "-q", "--debug", "--version"}
writing = {"-o", "--output", "--overwrite", "--dry-run", "--max-memory", "--threads"}
selecting = {"--include", "--exclude"}
ranks = {"--rank", "--energy", "--error", "--sv-ratio", "--sv-cumulative", "--sv-fro", "--knee", "--budget",
         "--uniform-rank", "--rank-pattern", "--max-rank", "--activations"}  # fmt: skip
SURFACE = {
    "inspect": {"--modules", *selecting},
    "graph": {"--as", "--depth", *selecting},
    "diff": {"--spectrum", "--max-rank", "--dry-run", "--max-memory", "--threads", "--device", *selecting},
    "verify": {"--base", "--adapter", "-w", "--max-memory", "--threads"},
    "merge": {"-w", "--dtype", "--max-shard-size", "--receipt", "--receipt-for", "--resume", "--device", *writing},
    "unmerge": {"-w", "--base", "--device", *writing},
    "extract": {"--rank", "--energy", "--error", "--sv-ratio", "--sv-cumulative", "--sv-fro", "--knee",
                "--budget", "--uniform-rank", "--rank-pattern", "--max-rank", "--preset", "--activations",
                "--save-full", "--only-low-rank", "--seed", "--format", "--base-model",
                "--device", *selecting, *writing},
    "stack": {"-w", "--method", "--density", "--epsilon", "--t", "--seed", *ranks, "--format", "--base",
              *selecting, *writing},
    "resize": {*ranks, "--format", "--base", *selecting, *writing},
    "rescale": {"--by", "--norm", "--blocks", "--absent", "--presets", "--factor",
                "--restate-alpha", "--bake", "--format", *selecting, *writing},
    "push": {"--private", "--create-pr", "--revision", "--message", "--dry-run"},
    "pull": {"-o", "--output", "--revision", "--overwrite", "--dry-run"},
    "demo": {"-o", "--output", "--seed"},
}  # fmt: skip
ARGUMENTS = {
    "inspect": ["source"], "graph": ["model"], "diff": ["a", "b", "others"],
    "verify": ["output", "inputs"], "merge": ["base", "adapters"], "unmerge": ["merged", "adapters"],
    "extract": ["base", "tuned"], "stack": ["adapters"], "resize": ["adapter"],
    "rescale": ["adapter"], "push": ["path", "repo_id"],
    "pull": ["repo_id"], "demo": ["story"],
}  # fmt: skip


def command(name):
    return main.get_command(click.Context(main), name)


def test_these_commands_and_no_others():
    """What belongs to later versions does not exist, not even as a stub."""
    assert list(COMMANDS) == list(SURFACE)
    assert main.list_commands(click.Context(main)) == list(SURFACE)


@pytest.mark.parametrize("name", SURFACE)
def test_every_command_takes_exactly_its_options(name):
    """Options and arguments are those of the contract."""
    parameters = command(name).params
    options = [each for each in parameters if isinstance(each, click.Option)]
    assert {flag for option in options for flag in option.opts} == SURFACE[name] | from_nothing
    assert [each.name for each in parameters if isinstance(each, click.Argument)] == ARGUMENTS[name]
    assert all(option.help for option in options)


@pytest.mark.parametrize("name", SURFACE)
def test_help_names_everything(name, run):
    """`--help` is exit 0, mentions each option, and ends in examples that use the command."""
    result = run(name, "--help")
    assert result.exit_code == 0
    assert all(flag in result.stdout for flag in SURFACE[name] | from_nothing)
    assert f"loratools {name} " in result.stdout.split("Examples:")[1]
    assert result.stderr == ""


def test_the_groups_help(run):
    """Every command with its purpose; exit codes; nothing on standard error."""
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout and text in result.stdout for name, (_, text) in COMMANDS.items())
    assert "73 output" in result.stdout


def test_nothing_asked_is_a_usage_error_that_shows_the_help(run):
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: loratools" in result.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["merge", "--version"], ["merge", "base", "--version"]])
def test_version(arguments, run):
    """Before and after the command, whatever else is missing."""
    from loratools import __version__

    assert run(*arguments).stdout == f"loratools {__version__}\n"
    assert json.loads(run("--json", *arguments).stdout) == {"loratools": __version__}


@pytest.mark.parametrize("name", sorted(set(SURFACE) - {"demo"}))
def test_options_are_the_verbs_own(name):
    """A parameter of a command is one of its verb's, by name and default: the CLI decides nothing."""
    import importlib
    import inspect

    from loratools.engine.methods import MethodOptions
    from loratools.engine.planning import RunOptions
    from loratools.engine.reductions import RankedRunOptions

    verb = inspect.signature(getattr(importlib.import_module(f"loratools.verbs.{name}"), name)).parameters
    theirs = set(verb) | (set(RunOptions.__annotations__) if "run" in verb else set())
    theirs |= set(RankedRunOptions.__annotations__) if "options" in verb else set()
    theirs |= set(MethodOptions.__annotations__) if name == "stack" else set()
    renamed = {"dry_run", "form", *(["modules"] if name == "inspect" else [])}
    for parameter in command(name).params:
        if parameter.expose_value and parameter.name not in renamed:
            assert parameter.name in theirs
            if parameter.name in verb and isinstance(parameter, click.Option) and not parameter.required:
                wanted = verb[parameter.name].default
                context = click.Context(command(name))
                assert parameter.get_default(context) in ([wanted], wanted) or not wanted, parameter.name


def test_help_of_the_group_imports_no_command():
    """The table alone answers `--help`: no verb, no rich, no torch, no Hub client."""
    code = (
        "import sys\nfrom loratools.cli.main import main\n"
        "try:\n    main.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('LOADED', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split("LOADED")[1].split())
    heavy = {"torch", "numpy", "rich", "huggingface_hub", "loratools.verbs", "loratools.engine"}
    assert not loaded & heavy
    assert not loaded & {f"loratools.cli.{name}" for name in COMMANDS}


def test_completion(shell):
    """Tab completes commands, as click does it."""
    done = shell(env={"_LORATOOLS_COMPLETE": "bash_complete", "COMP_WORDS": "loratools un", "COMP_CWORD": "1"})
    assert "unmerge" in done.stdout
