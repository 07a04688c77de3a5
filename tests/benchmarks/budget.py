"""What a budget over all modules is worth against one rank for all, on a real BERT and a real fine-tune of it.

python -m tests.benchmarks.budget            measures, and stores tests/benchmarks/results/budget.json
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import measure
from tests.benchmarks.cases import HERE, REPOSITORY

RESULT = HERE / "results" / "budget.json"
RANKS = (2, 4, 8, 16, 32)
WEIGHTS = "adapter_model.safetensors"
TITLE = "A budget against one rank for all"
TEXT = """\
`extract --budget SIZE` where SIZE is that of the file by `extract --rank N`, both with `--only-low-rank`, on
all-MiniLM-L6-v2 and a fine-tune of all its parameters by three steps of SGD. *Left* is Σ‖ΔW − Δ̂‖² by `--budget`
over that by `--rank`. *Of the bound*: what is captured, over the most that any choice of ranks could capture."""


def compare(base: Path, tuned: Path, rank: int, work: Path) -> dict[str, Any]:
    """Both rules at one size."""
    import loratools as lt

    level = lt.extract(base, tuned, work / f"rank-{rank}", rank=rank, only_low_rank=True)
    size = (work / f"rank-{rank}" / WEIGHTS).stat().st_size
    pooled = lt.extract(base, tuned, work / f"budget-{rank}", budget=size, only_low_rank=True)
    told = pooled.totals["budget"]
    ranks = [module["rank"] for module in pooled.modules]
    return {
        "rank": rank,
        "budget": size,
        "bytes": (work / f"budget-{rank}" / WEIGHTS).stat().st_size,
        "level": {"captured": level.totals["captured"], "modules": level.totals["modules"]},
        "pooled": {"captured": pooled.totals["captured"], "modules": len(ranks), "bound": told["bound"]},
        "ranks": {"least": min(ranks), "median": statistics.median(ranks), "most": max(ranks)},
        "left": (pooled.totals["residual"] / level.totals["residual"]) ** 2,
        "decomposed_again": len(told["decomposed_again"]),
    }


def section(result: Path = RESULT) -> str:
    """The part of docs/performance.md that tells it."""
    if not result.exists():
        return f"## {TITLE}\n\n{TEXT}\n\nNot measured yet.\n"
    record = json.loads(result.read_text(encoding="utf-8"))
    head = ["`--rank`", "bytes", "captured", "`--budget`: ranks", "modules", "captured", "left", "of the bound"]
    rows = [
        [
            str(row["rank"]),
            f"{row['budget']:,}",
            f"{row['level']['captured']:.4f}",
            "{least}–{most}, median {median:g}".format(**row["ranks"]),
            f"{row['pooled']['modules']} of {row['level']['modules']}",
            f"{row['pooled']['captured']:.4f}",
            f"{row['left']:.3f}",
            f"{row['pooled']['captured'] / row['pooled']['bound']:.5f}",
        ]
        for row in record["rows"]
    ]
    lines = [head, ["---:"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"## {TITLE}\n\n{TEXT}\n\n{table}\n\nCommit `{record['commit'][:12]}`, {record['date'][:10]}. {versions}.\n"


def main() -> int:
    """Measure, and store."""
    from tests import minilm

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = minilm.unpack(work / "base")
        tuned = minilm.tune_wholly(base, work / "tuned")
        rows = [compare(base, tuned, rank, work) for rank in RANKS]
    record = {
        "commit": measure.commit(REPOSITORY),
        "date": measure.now(),
        "versions": measure.versions(sys.executable),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
