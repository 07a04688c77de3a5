"""What `extract --rank auto` finds: adapters merged by PEFT into MiniLM, and full fine-tunes of it.

python -m tests.benchmarks.auto_rank            measures (twenty minutes), keeps the result, writes docs/auto-rank.md
python -m tests.benchmarks.auto_rank --only X   measures one adapter or fine-tune anew
python -m tests.benchmarks.auto_rank --render   writes the page from the result that is kept

The thresholds of `loratools.engine.recognition` were chosen on adapters and fine-tunes of other ranks, alphas, targets,
seeds, steps and sentences; nothing here played a part in that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import measure
from tests.benchmarks.cases import HERE, REPOSITORY

RESULT = HERE / "results" / "auto-rank.json"
SIZES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DTYPES = ("bf16", "fp16")
EVERY = "all-linear"
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 4, query and value": {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"], "steps": 50},
    "rank 6, all": {"r": 6, "lora_alpha": 6, "target_modules": EVERY},
    "rank 8, all": {"r": 8, "lora_alpha": 32, "target_modules": EVERY, "rate": 1e-3},
    "rank 12, all, rsLoRA": {"r": 12, "lora_alpha": 10, "target_modules": EVERY, "use_rslora": True},
    "rank 16, attention": {"r": 16, "lora_alpha": 24, "target_modules": ["query", "key", "value"], "rate": 5e-4},
    "rank 16, all, SGD": {"r": 16, "lora_alpha": 32, "target_modules": EVERY, "optimizer": "SGD", "rate": 0.5},
    "rank 32, dense": {"r": 32, "lora_alpha": 48, "target_modules": ["intermediate.dense", "output.dense"]},
    "rank 64, all": {"r": 64, "lora_alpha": 128, "target_modules": EVERY, "rate": 1e-3},
    "ranks 4, 8, 16 by pattern": {
        "r": 8, "lora_alpha": 20, "target_modules": EVERY, "rank_pattern": {"key": 16, "intermediate.dense": 4},
    },
}  # fmt: skip
SPECTRA = {"flat": 1.0, "falling": 0.85}
SYNTHETIC = {f"synthetic, {spectrum}, rank {rank}": (spectrum, rank) for spectrum in SPECTRA for rank in (4, 8, 16, 64)}
FULL: dict[str, dict[str, Any]] = {
    "AdamW, 30 steps of 1e-5": {"rate": 1e-5, "steps": 30},
    "AdamW, 15 steps of 1e-4": {"rate": 1e-4, "steps": 15},
    "AdamW, 10 steps of 5e-4": {"rate": 5e-4, "steps": 10},
    "AdamW, 10 steps of 1e-6": {"rate": 1e-6, "steps": 10},
    "SGD, 10 steps of 2": {"rate": 2.0, "steps": 10, "optimizer": "SGD"},
    "SGD, 30 steps of 20": {"rate": 20.0, "steps": 30, "optimizer": "SGD"},
    "AdamW, 20 steps of 3e-5, matrices alone": {"rate": 3e-5, "steps": 20, "only_matrices": True},
    "AdamW, 10 steps of 1e-6, matrices alone": {"rate": 1e-6, "steps": 10, "only_matrices": True},
}

Record = dict[str, Any]


def adapted(base: Path, name: str) -> torch.nn.Module:
    """A PEFT model with this adapter, trained or drawn."""
    from tests import activations, trained

    seed = 2000 + list({**ADAPTERS, **SYNTHETIC}).index(name)
    if name in ADAPTERS:
        return trained.adapt(base, seed=seed, sentences=activations.HELD_OUT, **ADAPTERS[name])
    spectrum, rank = SYNTHETIC[name]
    return trained.drawn(base, SPECTRA[spectrum], seed=seed, r=rank, lora_alpha=2 * rank, target_modules=EVERY)


def found_in(base: Path, tuned: Path, folder: Path, truth: dict[str, torch.Tensor]) -> Record:
    """What an extraction says of a merge, and how near it is to ΔW, beside the difference of the files."""
    import loratools as lt
    from tests import models

    with tempfile.TemporaryDirectory(dir=folder) as output:
        report = lt.extract(base, tuned, Path(output) / "out", rank="auto", threads=1)
        adapter = lt.load_adapter(Path(output) / "out")
        before, after = models.tensors_of(base), models.tensors_of(tuned)
        ratios, ranks = [], {module["name"]: module for module in report.modules}
        for name, change in truth.items():
            raw = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
            mine = adapter[name].delta_weight().double() if name in adapter else torch.zeros_like(raw)
            ratios.append(float((mine - change).norm() / (raw - change).norm()))
    return {
        "what": report.totals["recognised"]["what"],
        "said": report.totals["recognised"]["said"],
        "ranks": [ranks[name]["rank"] if name in ranks else 0 for name in truth],
        "alone": [ranks[name]["above_noise"] if name in ranks else 0 for name in truth],
        "fallen_back": sum(module["rank_rule"].startswith("energy") for module in report.modules),
        "ratio": [round(statistics.median(ratios), 4), round(max(ratios), 4)],
        "nearer": sum(ratio < 1 for ratio in ratios),
    }


def merges(bases: dict[str, Path], name: str, folder: Path) -> list[Record]:
    """One adapter at all sizes, in all dtypes."""
    from tests import trained

    model, rows = adapted(bases["bf16"], name), []
    true = [layer.r["default"] for layer in trained.layers_of(model).values()]
    for size in SIZES:
        trained.rescale(model, size)
        truth = trained.deltas(model)
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                tuned = trained.merge(bases[dtype], model, Path(place) / "merged")
                found = found_in(bases[dtype], tuned, folder, truth)
            rows.append({"adapter": name, "dtype": dtype, "size": size, "true": true, **found})
            print(name, dtype, size, found["said"], found["ratio"], flush=True)
    return rows


def fine_tunes(bases: dict[str, Path], name: str, folder: Path) -> list[Record]:
    """One way of fine-tuning, in all dtypes."""
    import loratools as lt
    from tests import activations, trained

    rows = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            options = {"seed": 99, "sentences": activations.HELD_OUT, **FULL[name]}
            tuned = trained.tune_fully(bases[dtype], Path(place) / "tuned", **options)
            report = lt.extract(bases[dtype], tuned, Path(place) / "out", rank="auto", threads=1)
        rows.append(
            {
                "tune": name,
                "dtype": dtype,
                "what": report.totals["recognised"]["what"],
                "said": report.totals["recognised"]["said"],
                "modules": len(report.modules),
                "fallen_back": sum(module["rank_rule"].startswith("energy") for module in report.modules),
                "relative": statistics.median(module["relative"] for module in report.modules),
                "alone": sorted(module["above_noise"] for module in report.modules),
                "ranks": sorted(module["rank"] for module in report.modules),
                "captured": statistics.median(module["captured"] for module in report.modules),
            }
        )
        print(name, dtype, rows[-1]["said"], Counter(rows[-1]["ranks"]).most_common(4), flush=True)
    return rows


def keep(name: str, rows: list[Record]) -> None:
    """Put the rows of one adapter or fine-tune in the place of those that are kept."""
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    kind, field, order = ("tunes", "tune", FULL) if name in FULL else ("merges", "adapter", {**ADAPTERS, **SYNTHETIC})
    fresh = [row for row in kept.get(kind, []) if row[field] != name] + rows
    fresh.sort(key=lambda row: (list(order).index(row[field]), row["dtype"], row.get("size", 0)))
    result = {
        "merges": kept.get("merges", []),
        "tunes": kept.get("tunes", []),
        "schema": "loratools/benchmark-auto-rank/1",
        "machine": measure.machine(),
        "commit": measure.commit(REPOSITORY),
        "date": measure.now(),
        "versions": measure.versions(sys.executable),
        kind: fresh,
    }
    RESULT.write_text(json.dumps(result, sort_keys=True).replace('}, {"', '},\n {"') + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Measure, or render what was measured."""
    from tests import minilm, trained
    from tests.benchmarks import auto_rank_page

    every = [*ADAPTERS, *SYNTHETIC, *FULL]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.auto_rank", description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    if not options.render:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            source = minilm.unpack(folder / "float32")
            bases = {dtype: trained.stored(source, folder / dtype, trained.DTYPES[dtype]) for dtype in DTYPES}
            for name in options.only:
                keep(name, (fine_tunes if name in FULL else merges)(bases, name, folder))
    auto_rank_page.write(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
