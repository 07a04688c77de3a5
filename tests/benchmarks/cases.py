"""The sides of every benchmark: which command stands for `loratools`, for each peer, and on which inputs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.measure import Contender

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
SUBJECT = "loratools"
RANK = "16"
# Nothing may wait for a network that times out on one machine and answers on another.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Setting:
    """Where inputs and outputs lie, and which interpreters run which side."""

    work: Path
    python: str = sys.executable
    peers: str = sys.executable

    def loratools(self, *arguments: str | Path, output: Path | None = None, name: str = SUBJECT) -> Contender:
        """Our side, as a user starts it."""
        command = [self.python, "-m", "loratools", *map(str, arguments)]
        return Contender(name, command, output, OFFLINE)

    def input(self, size: str, kind: str) -> Path:
        """Build an input in a process of its own: numpy must not be in the memory that children start from."""
        return self._build("builders", size, kind, str(self.work))

    def giant(self) -> Path:
        """Build the headers of a terabyte."""
        return self._build("giant", str(self.work / "giant"))

    def output(self, name: str) -> Path:
        """Where one side writes."""
        return self.work / "out" / name

    def _build(self, module: str, *arguments: str) -> Path:
        command = [self.python, "-m", f"tests.benchmarks.{module}", *arguments]
        answer = subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True).stdout
        return Path(answer.strip())


@dataclass(frozen=True)
class Case:
    """Sides that are measured together. `judge` names the check that `checks.py` makes of each of our runs."""

    variant: str
    contenders: list[Contender]
    judge: str | None = None


def extract(setting: Setting, size: str) -> list[Case]:
    """`loratools extract` against mergekit, both at rank 16."""
    base = setting.input(size, "base")
    cases = []
    for kind in ("lora", "finetune"):
        tuned, ours, theirs = setting.input(size, kind), setting.output("extract"), setting.output("mergekit")
        command = [str(Path(setting.peers).parent / "mergekit-extract-lora"), "--max-rank", RANK]
        command += ["--model", str(tuned), "--base-model", str(base), "--out-path", str(theirs)]
        mergekit = Contender("mergekit-extract-lora", command, theirs, OFFLINE)
        subject = setting.loratools("extract", base, tuned, "-o", ours, "--rank", RANK, output=ours)
        cases.append(Case(kind, [subject, mergekit]))
    return cases


def merge(setting: Setting, size: str) -> list[Case]:
    """`loratools merge` (receipt, report and hashes included) against merges without them, PEFT, and a mere copy."""
    base, adapter = setting.input(size, "base"), setting.input(size, "adapter")
    ours, bare, plain = setting.output("merge"), setting.output("bare"), setting.output("plain")
    same, peft, copy = setting.output("same"), setting.output("peft"), setting.output("copy")
    inputs = [str(base), str(adapter)]
    none = ["--receipt", "none"]
    script = [setting.python, str(HERE / "plain_merge.py"), *inputs]
    return [
        Case(
            "adapter",
            [
                setting.loratools("merge", *inputs, "-o", ours, output=ours),
                setting.loratools("merge", *inputs, "-o", bare, *none, output=bare, name=" ".join(none)),
                Contender("plain merge", [*script, str(plain)], plain),
                Contender("plain merge, same bits", [*script, str(same), "--same-bits"], same),
                Contender("peft", [setting.peers, str(HERE / "peft_merge.py"), *inputs, str(peft)], peft, OFFLINE),
                Contender("cp -r; sync", ["sh", "-c", 'cp -r "$0" "$1" && sync', str(base), str(copy)], copy),
            ],
        )
    ]


def unmerge(setting: Setting, size: str) -> list[Case]:
    """The base from the receipt alone, against the base brought along, and a mere copy."""
    base, merged = setting.input(size, "base"), setting.output("merged")
    ours, based, copy = setting.output("unmerge"), setting.output("based"), setting.output("copy")
    if not merged.exists():
        merging = setting.loratools("merge", base, setting.input(size, "adapter"), "-o", merged)
        subprocess.run(merging.command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return [
        Case(
            "receipt",
            [
                setting.loratools("unmerge", merged, "-o", ours, output=ours),
                setting.loratools("unmerge", merged, "--base", base, "-o", based, output=based, name="--base"),
                Contender("cp -r; sync", ["sh", "-c", 'cp -r "$0" "$1" && sync', str(base), str(copy)], copy),
            ],
            judge="plan",
        )
    ]


def stack(setting: Setting, size: str) -> list[Case]:
    """`loratools stack --rank 16` of two adapters of rank 16 against PEFT's add_weighted_adapter."""
    two = [str(setting.input(size, kind)) for kind in ("adapter", "second")]
    base, ours, theirs = setting.input(size, "base"), setting.output("stack"), setting.output("peft")
    command = [setting.peers, str(HERE / "peft_stack.py"), str(base), *two, RANK, str(theirs)]
    subject = setting.loratools("stack", *two, "-o", ours, "--rank", RANK, output=ours)
    return [Case("rank 16 of 16 + 16", [subject, Contender("peft, svd", command, theirs, OFFLINE)], judge="plan")]


def large_adapters(setting: Setting) -> list[Case]:
    """Two adapters of rank 64 for a model of 70 B parameters: their exact sum, its rank lowered, and one resized."""
    two, ours = [str(setting.input("70b", kind)) for kind in ("adapter", "second")], setting.output("large")
    commands = {
        "stack": ("stack", *two),
        "stack --rank 32": ("stack", *two, "--rank", "32"),
        "resize --rank 32": ("resize", two[0], "--rank", "32"),
    }
    return [
        Case(name, [setting.loratools(*words, "-o", ours, output=ours)], judge="plan and 1 GiB")
        for name, words in commands.items()
    ]


def startup(setting: Setting) -> list[Case]:
    """What a user waits for before any work is done."""
    giant = setting.giant()
    mergekit = str(Path(setting.peers).parent / "mergekit-extract-lora")
    return [
        Case("--help", [setting.loratools("--help"), Contender("mergekit-extract-lora", [mergekit, "--help"])]),
        Case("inspect, 1 TB", [setting.loratools("inspect", giant)]),
        Case("inspect --modules --json, 1 TB", [setting.loratools("inspect", giant, "--modules", "--json")]),
    ]


def memory(setting: Setting) -> list[Case]:
    """Peak memory against what the plan announces; a 3 GB model within 1 GiB."""
    ours = setting.output("memory")
    cases = []
    for size in ("155m", "1.1b"):
        inputs = [setting.input(size, "base"), setting.input(size, "finetune")]
        subject = setting.loratools("extract", *inputs, "-o", ours, "--rank", RANK, output=ours)
        cases.append(Case(f"extract {size}", [subject], judge="plan"))
    for size, judge in (("155m", "plan"), ("1.1b", "plan"), ("3gb", "plan and 1 GiB")):
        inputs = [setting.input(size, "base"), setting.input(size, "adapter")]
        cases.append(Case(f"merge {size}", [setting.loratools("merge", *inputs, "-o", ours, output=ours)], judge))
    return cases


def growth(setting: Setting) -> list[Case]:
    """Time in proportion to the model, memory not: our side alone, on three sizes."""
    ours = setting.output("growth")
    cases = []
    for verb, kind in (("merge", "adapter"), ("extract", "finetune")):
        for size in ("155m", "1.1b", "3gb"):
            inputs = [setting.input(size, "base"), setting.input(size, kind)]
            rank = ["--rank", RANK] if verb == "extract" else []
            cases.append(Case(f"{verb} {size}", [setting.loratools(verb, *inputs, "-o", ours, *rank, output=ours)]))
    return cases
