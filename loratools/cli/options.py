"""Every flag and argument, declared once: a flag means the same in every command.

A parameter is named as the verb's own, so that a command hands on what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from loratools.cli.output import Output
from loratools.cli.values import (
    listed,
    local_output,
    number,
    rank,
    ranks_of_patterns,
    size,
    work_directory,
)

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


def _all(*decorators: Callable[[Any], Any]) -> Decorator[Function]:
    def apply(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def _flag(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def note(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        del parameter
        if value:
            setattr(context.ensure_object(Output), name, True)

    return note


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    del parameter
    if not value or context.resilient_parsing:
        return
    from loratools.engine.reports import version

    click.echo(f'{{"loratools": "{version()}"}}' if context.ensure_object(Output).json else f"loratools {version()}")
    context.exit()


COMMON: Final = (
    click.Option(
        ["--json"], is_flag=True, expose_value=False, callback=_flag("json"), help="One JSON document on stdout."
    ),
    click.Option(
        ["-q"],
        is_flag=True,
        expose_value=False,
        callback=_flag("quiet"),
        help="No progress, no report of what was written.",
    ),
    click.Option(
        ["--debug"], is_flag=True, expose_value=False, callback=_flag("debug"), help="Show a traceback with an error."
    ),
    click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
    ),
)
"""What every command takes, before its name or after it."""


def command(name: str, *, examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """`click.command` with the common options last, and a page that ends in examples."""
    lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.command(name, epilog=f"\b\nExamples:\n{lines}")(click.pass_obj(function))
        made.params.extend(COMMON)
        return made

    return decorate


def switch(*names: str, help: str) -> Decorator[Any]:
    """An option without a value."""
    return click.option(*names, is_flag=True, help=help)


# Inputs.
source = click.argument("source")
base = click.argument("base")
tuned = click.argument("tuned")
merged = click.argument("merged")
model = click.argument("model")
adapter = click.argument("adapter")
adapters = click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
any_adapters = click.argument("adapters", metavar="[ADAPTER...]", nargs=-1)
first = click.argument("a")
second = click.argument("b")
others = click.argument("others", metavar="...", nargs=-1)
checked = click.argument("output")
inputs = click.argument("inputs", metavar="[INPUT...]", nargs=-1)
repo_id = click.argument("repo_id")
path = click.argument("path")
shapes = click.option(
    "--base", metavar="MODEL", help="What the adapters are for, where their tensors do not say how large ΔW is."
)
original = click.option("--base", metavar="BASE", help="What was merged into; the result is exact then, bit for bit.")
merged_into = click.option("--base", metavar="BASE", help="What it should have been merged into.")
named_adapters = click.option(
    "--adapter", "adapters", metavar="ADAPTER", multiple=True, help="What should have been merged. Repeatable."
)
revision = click.option("--revision", metavar="R", help="A branch, a tag, a commit, or refs/pr/N.")

# Selection.
selecting = _all(
    click.option(
        "--include",
        metavar="PATTERN",
        multiple=True,
        help="Only these modules: a glob that ends their path, or re:REGEX. Repeatable.",
    ),
    click.option("--exclude", metavar="PATTERN", multiple=True, help="Not these modules. Repeatable."),
)

# Outputs.
output = click.option(
    "-o", "--output", "output", metavar="OUT", required=True, type=local_output, help="Where to write."
)
overwrite = switch("--overwrite", help="Replace the output if it is there, a directory with all that it holds.")
dry_run = switch("--dry-run", help="Show the plan; write nothing.")
max_memory = click.option("--max-memory", metavar="SIZE", type=size, help="Refuse to need more memory than this.")
threads = click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="Work on N things at a time; the result does not depend on it.",
)
writing = _all(output, overwrite, dry_run, max_memory, threads)
"""What every command takes that writes weights."""
observing = _all(switch("--dry-run", help="Show the plan; read headers only."), max_memory, threads)
"""What a command takes that reads weights and writes nothing."""
dtype = click.option("--dtype", metavar="D", help="bf16, fp16 or fp32 for all weights; default each one's own.")
max_shard_size = click.option(
    "--max-shard-size", metavar="SIZE", type=size, help="Largest weights file; default the base's own files."
)
receipt = click.option(
    "--receipt",
    type=click.Choice(("full", "lean", "none")),
    help="What unmerge needs: full, with the adapters' factors, is the default where it can be; lean, without; none.",
)
receipt_for = click.option(
    "--receipt-for",
    metavar="MERGED",
    help="Write only a receipt, for this checkpoint that something else merged; OUT ends in .receipt.",
)
resume = click.option(
    "--resume",
    metavar="WORKDIR",
    type=work_directory,
    help="Keep what is done in this directory, and go on from what an earlier run left in it.",
)
base_model = click.option(
    "--base-model", metavar="OWNER/NAME", help="The base's name on the Hub, for the adapter's configuration and card."
)
adapter_format = click.option("--format", metavar="F", help="The adapter's dialect; default the inputs' own.")
new_format = click.option("--format", metavar="F", default="peft", show_default=True, help="The adapter's dialect.")
device = click.option("--device", metavar="D", default="auto", show_default=True, help="auto, cpu, cuda[:N] or mps.")
seed = click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="Decides whatever is random.")
weights = click.option(
    "-w",
    "weights",
    metavar="W",
    type=float,
    multiple=True,
    callback=listed,
    help="Multiplies ΔW: none, one for all, or one per adapter. Repeatable.",
)
method = _all(
    click.option(
        "--method",
        metavar="NAME",
        default="sum",
        show_default=True,
        help="sum, linear, slerp, karcher, model-stock; ties, dare, della, magnitude, which need an option for ranks; "
        "knots, core-space, tsv, iso-c.",
    ),
    click.option("--density", metavar="D", type=float, help="The share of entries that is kept, in (0, 1]."),
    click.option("--epsilon", metavar="E", type=float, help="della: keep with probabilities D ± E/2; default 0.3."),
    click.option("--t", metavar="T", type=float, help="slerp: how far from the first to the second; default 0.5."),
    click.option("--seed", metavar="N", type=int, help="Of ties, dare, della, magnitude: decides whatever is random."),
)
preset = click.option(
    "--preset",
    type=click.Choice(("fast", "default", "certified", "exact")),
    default="default",
    show_default=True,
    help="Effort of the SVD; certified proves how near the best it is; exact is dense, O(n³).",
)
activations = click.option(
    "--activations",
    metavar="FILE",
    help="Be exact where inputs are large: their RMS as .safetensors, or an imatrix of llama.cpp.",
)
save_full = click.option("--save-full", metavar="PATTERN", multiple=True, help="Store these modules whole. Repeatable.")
only_low_rank = switch("--only-low-rank", help="Leave out, and name, what changed and is no matrix.")
kept_output = click.option(
    "-o", "--output", metavar="OUT", type=local_output, help="A new directory to keep the files in."
)

# Rules for ranks, and for scalings.
_rank_rules: Decorator[Any] = _all(
    click.option("--energy", metavar="E", type=float, help="The least rank that captures this share of ‖ΔW‖²."),
    click.option("--error", metavar="E", type=float, help="The least rank whose relative residual is at most this."),
    click.option(
        "--budget", metavar="SIZE", type=size, help="Ranks for all modules out of a weights file of this size."
    ),
    switch("--uniform-rank", help="With --budget: the largest rank that all modules can have."),
    click.option(
        "--max-rank",
        metavar="N",
        type=int,
        default=256,
        show_default=True,
        help="Cap on a rank that a rule chooses.",
    ),
    click.option("--sv-ratio", metavar="X", type=float, help="All singular values of at least the largest / X."),
    click.option("--sv-cumulative", metavar="P", type=float, help="The least rank with this share of the sum of σ."),
    click.option("--sv-fro", metavar="P", type=float, help="The least rank that captures this share of ‖ΔW‖."),
    switch("--knee", help="What comes before the knee of the singular values."),
    click.option(
        "--rank-pattern",
        metavar="PATTERN=N",
        multiple=True,
        callback=ranks_of_patterns,
        help="This rank for these modules, whatever the rule. Repeatable; the first that matches decides.",
    ),
)
extraction_rank = _all(
    click.option(
        "--rank", metavar="N", type=rank, help="This rank for every module (16 if no rule is given), or auto."
    ),
    _rank_rules,
)
ranks = _all(
    click.option("--rank", metavar="N", type=int, help="This rank for every module; less where no more exists."),
    _rank_rules,
)
rescaling = _all(
    click.option("--by", metavar="X", type=float, help="Multiply ΔW; only alpha changes. May be negative."),
    click.option("--norm", metavar="N", type=float, help="Bring ‖ΔW‖ of every module down to N where it is larger."),
    click.option(
        "--blocks",
        metavar="SPEC",
        multiple=True,
        help="Weights by block: a vector, BLOCKS:ELEMENTS:W, PATTERN=W or a preset. Repeatable; the last one decides.",
    ),
    click.option("--absent", type=click.Choice(("0", "1")), callback=number, help="For blocks a vector leaves out."),
    click.option("--presets", metavar="FILE", help="Lines NAME:WEIGHTS, whose names --blocks may give."),
    click.option(
        "--factor",
        type=click.Choice(("lora_A", "lora_B", "both")),
        help="What takes the number instead of alpha, for readers that know no alpha; both take its root.",
    ),
    click.option("--restate-alpha", metavar="A", type=float, help="The same ΔW with this alpha."),
    switch("--bake", help="The same ΔW with alpha = rank, so that every reader agrees on the scaling."),
)

# The Hub, and the demo.
private = switch("--private", help="Make the repository private, if it is made.")
create_pr = switch("--create-pr", help="Open a pull request instead of committing to the branch.")
message = click.option("--message", metavar="M", help="The commit's first line.")
story = click.argument("story", metavar="[adapt]", default="adapt")

# What is shown.
modules = switch("--modules", help="Also a line for every module.")
spectrum = switch("--spectrum", help="Also singular values, effective ranks, and a table rank → size → error.")
spectrum_rank = click.option(
    "--max-rank", metavar="N", type=int, default=128, show_default=True, help="Singular values per matrix to look at."
)
form = click.option(
    "--as",
    "form",
    type=click.Choice(("tree", "json", "dot", "mermaid")),
    default="tree",
    show_default=True,
    help="A tree for people, JSON, Graphviz, or Mermaid.",
)
depth = click.option("--depth", metavar="N", type=click.IntRange(min=1), help="Not deeper than this.")
