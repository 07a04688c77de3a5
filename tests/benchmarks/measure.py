"""Time whole processes in alternation: A B A B …, so that what the machine does meanwhile falls on both sides.

Standard library only, and nothing heavy may be imported here or by the caller: a child's peak memory can never read
lower than what its parent held when it was started (Linux keeps the high-water mark across `exec`).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SCHEMA = "loratools-benchmarks/1"
QUANTITIES = ("wall", "cpu", "peak_rss")
PACKAGES = ("loratools", "torch", "numpy", "safetensors", "transformers", "peft", "mergekit")


class BenchmarkError(Exception):
    """A contender failed; its last words are in the message."""


@dataclass(frozen=True)
class Contender:
    """One side: a command, what it writes, and the variables it runs under."""

    name: str
    command: Sequence[str]
    output: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One run: seconds, CPU seconds (user + system), bytes, and how many cores others kept busy meanwhile."""

    wall: float
    cpu: float
    peak_rss: int
    others: float


@dataclass(frozen=True)
class Spread:
    """Median and extremes of one quantity."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise `values`."""
        return cls(statistics.median(values), min(values), max(values))


def run_once(contender: Contender) -> Sample:
    """Run a contender once; its output of the run before is removed first."""
    if contender.output is not None:
        shutil.rmtree(contender.output, ignore_errors=True)
        contender.output.parent.mkdir(parents=True, exist_ok=True)
    os.sync()  # the disk must not be busy with the other side's output
    with tempfile.TemporaryFile() as log:
        busy, start = busy_seconds(), time.perf_counter()
        process = subprocess.Popen(
            contender.command, stdout=log, stderr=log, env={**os.environ, **contender.environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            words = log.read().decode(errors="replace")[-2000:]
            raise BenchmarkError(f"{contender.name} exited with {process.returncode}:\n{words}")
    # wait4 counts the child with all children that it waited for: CPU time summed, memory of the largest process.
    cpu = usage.ru_utime + usage.ru_stime
    others = max(0.0, busy_seconds() - busy - cpu) / wall
    return Sample(wall, cpu, usage.ru_maxrss * 1024, others)


def busy_seconds() -> float:
    """CPU seconds that the machine has spent on anything, steal included."""
    fields = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def alternate(contenders: Sequence[Contender], runs: int, warm_up: int = 1) -> dict[str, list[Sample]]:
    """Run all sides in turn, `runs` times each after `warm_up` unrecorded rounds."""
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    for number in range(-warm_up, runs):
        for contender in contenders:
            sample = run_once(contender)
            print(f"  {'warm-up' if number < 0 else number + 1} {contender.name}: {describe(sample)}", flush=True)
            if number >= 0:
                samples[contender.name].append(sample)
    return samples


def describe(sample: Sample) -> str:
    """One run in a line."""
    memory = sample.peak_rss / 2**20
    return f"{sample.wall:.2f} s, cpu {sample.cpu:.2f} s, {memory:.0f} MiB, others {sample.others:.2f}"


def summarise(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Spread of every quantity of every side, with the samples themselves."""
    return {
        name: {
            **{key: asdict(Spread.of([getattr(sample, key) for sample in runs])) for key in QUANTITIES},
            "samples": [asdict(sample) for sample in runs],
        }
        for name, runs in samples.items()
    }


def ratios(samples: Mapping[str, Sequence[Sample]], subject: str) -> dict[str, Any]:
    """Other ÷ subject of each pair of neighbouring runs: above 1, the subject is better."""
    if subject not in samples:
        return {}
    found: dict[str, Any] = {}
    for name, runs in samples.items():
        if name != subject:
            pairs = list(zip(samples[subject], runs, strict=True))
            found[name] = {
                key: asdict(Spread.of([getattr(other, key) / getattr(ours, key) for ours, other in pairs]))
                for key in QUANTITIES
            }
    return found


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    model = next((line for line in proc_lines("cpuinfo") if line.startswith("model name")), ":unknown")
    memory = next((line for line in proc_lines("meminfo") if line.startswith("MemTotal")), ":0 kB")
    return {
        "cpu": model.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(memory.partition(":")[2].split()[0]) * 1024,
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
    }


def proc_lines(name: str) -> list[str]:
    """The lines of a file in /proc."""
    return Path("/proc", name).read_text(encoding="utf-8").splitlines()


def commit(repository: Path) -> str:
    """The commit that was measured, with `+` where the working tree differs from it."""
    try:
        head = git(repository, "rev-parse", "HEAD")
        return head + ("+" if git(repository, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(repository: Path, *arguments: str) -> str:
    """Ask git."""
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def versions(python: str) -> dict[str, str]:
    """The versions of what matters in another interpreter's environment."""
    script = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': sys.version.split()[0], **{n: found[n] for n in sys.argv[1:] if n in found}}))"
    )
    command = [python, "-c", script, *PACKAGES]
    answer: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def now() -> str:
    """The date of a result."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append_result(path: Path, record: dict[str, Any]) -> None:
    """Add a record to the list that `path` holds."""
    history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*history, record], indent=1) + "\n", encoding="utf-8")
