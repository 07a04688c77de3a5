"""Run the benchmarks and keep their results.

    python -m tests.benchmarks.run --peers .peers/bin/python --only extract-155m merge-155m

Inputs are built under `--work` (24 GB for all of them, outputs need 12 more) and stay there. A result is worth keeping
only from a machine with nothing else to do: the load of others is measured with every run, and docs/performance.md says
where it was not quiet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import cases, checks, measure
from tests.benchmarks.cases import HERE, REPOSITORY, SUBJECT, Case, Setting

WORK = Path.home() / ".cache" / "loratools-benchmarks"
BENCHMARKS: dict[str, Callable[[Setting], list[Case]]] = {
    "startup": cases.startup,
    "extract-155m": partial(cases.extract, size="155m"),
    "merge-155m": partial(cases.merge, size="155m"),
    "extract-1.1b": partial(cases.extract, size="1.1b"),
    "merge-1.1b": partial(cases.merge, size="1.1b"),
    "unmerge-155m": partial(cases.unmerge, size="155m"),
    "stack-155m": partial(cases.stack, size="155m"),
    "stack-70b": cases.large_adapters,
    "memory": cases.memory,
    "growth": cases.growth,
}


def run_case(case: Case, sides: list[str], runs: int, warm_up: int) -> dict[str, Any] | None:
    """Measure one case, or nothing where none of its sides was asked for."""
    contenders = [contender for contender in case.contenders if not sides or contender.name in sides]
    if not contenders:
        return None
    print(f" {case.variant}", flush=True)
    samples = measure.alternate(contenders, runs, warm_up)
    record = {
        "variant": case.variant,
        "subject": SUBJECT,
        "contenders": measure.summarise(samples),
        "ratios": measure.ratios(samples, SUBJECT),
    }
    if case.judge is not None:
        highest = max(sample.peak_rss for sample in samples[SUBJECT])
        record["verdict"] = checks.judge(case.judge, contenders[0], highest)
        print(f"  {record['verdict']}", flush=True)
    return record


def run_benchmark(name: str, setting: Setting, options: argparse.Namespace) -> None:
    """Run the cases of one benchmark; each is stored as soon as it is there."""
    print(name, flush=True)
    about = {
        "schema": measure.SCHEMA,
        "benchmark": name,
        "runs": options.runs,
        "warm_up": options.warm_up,
        "machine": measure.machine(),
        "commit": measure.commit(REPOSITORY),
        "versions": {"loratools": measure.versions(setting.python), "peers": measure.versions(setting.peers)},
    }
    for case in BENCHMARKS[name](setting):
        record = run_case(case, options.sides, options.runs, options.warm_up)
        if record is not None:
            measure.append_result(options.results / f"{name}.json", {**about, "date": measure.now(), **record})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description="Run the benchmarks.")
    found.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    found.add_argument("--sides", nargs="+", default=[], metavar="SIDE", help="measure these contenders only")
    found.add_argument("--runs", type=int, default=5, help="recorded runs of each side (default 5)")
    found.add_argument("--warm-up", type=int, default=1, help="unrecorded rounds before them (default 1)")
    found.add_argument("--work", type=Path, default=WORK, help=f"inputs and outputs (default {WORK})")
    found.add_argument("--results", type=Path, default=HERE / "results")
    found.add_argument("--python", default=sys.executable, help="the interpreter that has loratools")
    found.add_argument("--peers", default=sys.executable, help="the interpreter that has mergekit and peft")
    return found


def main(arguments: list[str]) -> None:
    """Run what the command line names."""
    options = parser().parse_args(arguments)
    # Absolute paths: mergekit takes a relative path for the name of a repository and asks the network about it.
    # Not resolved: a virtual environment's interpreter is a link, and the peers' scripts lie beside the link.
    python, peers = (str(Path(path).absolute()) for path in (options.python, options.peers))
    setting = Setting(options.work.absolute(), python, peers)
    for name in options.only:
        run_benchmark(name, setting, options)


if __name__ == "__main__":
    main(sys.argv[1:])
