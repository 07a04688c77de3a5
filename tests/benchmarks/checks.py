"""What a run must also satisfy besides being fast: the memory that its plan announced."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from tests.benchmarks.measure import BenchmarkError, Contender

PEAK_KEY = "peak_bytes"
GIBIBYTE = 2**30


def find_peak(document: Any) -> int | None:
    """The first `peak_memory` anywhere in a plan, in bytes."""
    if isinstance(document, dict):
        if isinstance(document.get(PEAK_KEY), int):
            return int(document[PEAK_KEY])
        document = list(document.values())
    if isinstance(document, list):
        return next((peak for peak in map(find_peak, document) if peak is not None), None)
    return None


def announced_peak(contender: Contender) -> int:
    """Ask the command for its plan."""
    command = [*contender.command, "--dry-run", "--json"]
    environment = {**os.environ, **contender.environment}
    plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    peak = find_peak(plan)
    if peak is None:
        raise BenchmarkError(f"The plan of {contender.name} has no `{PEAK_KEY}`.")
    return peak


def judge(kind: str, contender: Contender, measured: float) -> dict[str, Any]:
    """Compare the highest peak with the plan, and with 1 GiB where the case asks for it."""
    announced = announced_peak(contender)
    verdict = {"announced": announced, "measured": measured, "within_plan": measured <= announced}
    if "1 GiB" in kind:
        verdict["within_1_gib"] = measured <= GIBIBYTE
    return verdict
