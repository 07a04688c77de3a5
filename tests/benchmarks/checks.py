"""What a run must also satisfy besides being fast: the memory that its plan announced."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from tests.benchmarks.measure import BenchmarkError, Contender

GIBIBYTE = 2**30


def announced_peak(contender: Contender) -> int:
    """Ask the command for its plan."""
    command = [*contender.command, "--overwrite", "--dry-run", "--json"]  # the measured run left its output
    environment = {**os.environ, **contender.environment}
    plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    return peak_of(plan)


def peak_of(plan: Any) -> int:
    """The predicted peak of the whole process, in bytes, from a plan's JSON.

    Raises:
        BenchmarkError: it is not where plans keep it.
    """
    try:
        return int(plan["bounds"]["peak_bytes"])
    except (KeyError, TypeError) as error:
        raise BenchmarkError("The plan says no peak.") from error


def judge(kind: str, contender: Contender, measured: float) -> dict[str, Any]:
    """Compare the highest peak with the plan, and with 1 GiB where the case asks for it."""
    announced = announced_peak(contender)
    verdict = {"announced": announced, "measured": measured, "within_plan": measured <= announced}
    if "1 GiB" in kind:
        verdict["within_1_gib"] = measured <= GIBIBYTE
    return verdict
