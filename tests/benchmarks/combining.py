"""Which method combines three adapters best: real tasks, learned separately, judged by losses on what none has seen.

python -m tests.benchmarks.combining --work DIR   trains (half an hour, once), combines and judges, keeps the result
python -m tests.benchmarks.combining_page         writes docs/combining.md from the result that is kept

all-MiniLM-L6-v2 learns three tasks (`pairs`), each in an adapter of its own by PEFT: to find the right one of 24 second
texts for a first one (InfoNCE, both ways). Then every method makes one adapter of the three.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import measure
from tests.benchmarks.cases import HERE, REPOSITORY
from tests.benchmarks.pairs import TASKS, Pair, pairs

RESULT = HERE / "results" / "combining.json"
RANK, ALPHA, STEPS, RATE = 8, 16, 64, 1e-3
TRAINED, GROUP, LONGEST = 1536, 24, 32
JUDGED = {"dev": 128, "test": 256}
CHOICES = 64  # second texts to choose from, where a loss is measured
SIZES = (1.0, 2.0, 3.0)  # times ‖mean of the three‖: 3 is their sum
SEEDS = (0, 1, 2)
METHODS: Mapping[str, Mapping[str, Any]] = {
    "sum": {},
    "karcher": {},
    "model-stock": {},
    "ties": {"density": 0.2, "rank": 3 * RANK},
    "ties, density 0.5": {"density": 0.5, "rank": 3 * RANK},
    "dare": {"density": 0.5, "rank": 3 * RANK},
    "della": {"density": 0.5, "rank": 3 * RANK},
    "magnitude": {"density": 0.5, "rank": 3 * RANK},
    "knots": {},
    "core-space": {},
    "tsv": {},
    "iso-c": {},
}

Losses = dict[str, float]


class Judge:
    """MiniLM, and how well it tells which texts belong together, with a change to its weights or without."""

    def __init__(self, base: Path) -> None:
        from transformers import AutoTokenizer

        from tests import models

        self.base = base
        self.model = models.load(base).float().eval()
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self.texts = {task: pairs(task) for task in TASKS}

    def loss(self, model: torch.nn.Module, some: Sequence[Pair]) -> torch.Tensor:
        """InfoNCE at temperature 0.05, from the first texts to the second and back, averaged."""
        one, other = (self._embedded(model, list(texts)) for texts in zip(*some, strict=True))
        scores, right = one @ other.T / 0.05, torch.arange(len(some))
        cross = torch.nn.functional.cross_entropy
        return (cross(scores, right) + cross(scores.T, right)) / 2

    def losses(self, part: str) -> Losses:
        """Of every task, for the model as it is."""
        found = {}
        with torch.no_grad():
            for task, texts in self.texts.items():
                some = texts[part][: JUDGED[part]]
                groups = [some[first : first + CHOICES] for first in range(0, len(some), CHOICES)]
                found[task] = sum(float(self.loss(self.model, each)) for each in groups) / len(groups)
        return found

    def with_change(self, deltas: Mapping[str, torch.Tensor], factor: float, part: str) -> Losses:
        """The losses with `factor` times these ΔW added to the weights, which are put back."""
        weights = {name: self.model.get_parameter(f"{name}.weight") for name in deltas}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, delta in deltas.items():
                weights[name] += (factor * delta).float()
            found = self.losses(part)
            for name, weight in weights.items():
                weight.copy_(before[name])
        return found

    def trained(self, task: str, seed: int, target: Path) -> Path:
        """An adapter that learned this task; made where it is not there."""
        from peft import LoraConfig, get_peft_model

        from tests import models

        if target.exists():
            return target
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=r".*(query|key|value|(?<!pooler\.)dense)")
        with models.quiet():
            model = get_peft_model(models.load(self.base).float(), config)
        stepper = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE)
        texts = self.texts[task]["train"][:TRAINED]
        model.train()
        for step in range(STEPS):
            first = step * GROUP % len(texts)
            stepper.zero_grad()
            self.loss(model, texts[first : first + GROUP]).backward()
            stepper.step()
        model.save_pretrained(target, save_embedding_layers=False)
        return target

    def _embedded(self, model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        states = model(**tokens).last_hidden_state
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def deltas_of(adapter: Path) -> dict[str, torch.Tensor]:
    """Module → ΔW."""
    import loratools as lt

    return {name: update.delta_weight() for name, update in lt.load_adapter(adapter).items()}


def mean_share(losses: Losses, base: Losses, own: Losses) -> float:
    """How much of what the three adapters gain each on its own task is kept, on average; 1 is all of it."""
    shares = [(base[task] - losses[task]) / (base[task] - own[task]) for task in losses]
    return sum(shares) / len(shares)


def one_seed(judge: Judge, seed: int, folder: Path) -> dict[str, Any]:
    """Every method on the three adapters of one seed; what was judged before is read again."""
    import loratools as lt

    kept = folder / f"seed-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())  # type: ignore[no-any-return]
    adapters = {task: judge.trained(task, seed, folder / f"{task}-{seed}") for task in TASKS}
    single = {task: deltas_of(path) for task, path in adapters.items()}
    base = {part: judge.losses(part) for part in JUDGED}
    alone = {task: {part: judge.with_change(each, 1.0, part) for part in JUDGED} for task, each in single.items()}
    own = {part: {task: alone[task][part][task] for task in TASKS} for part in JUDGED}
    mean = {name: sum(each[name] for each in single.values()) / len(single) for name in single["prose"]}
    wanted = norm(mean)
    rows = {}
    for label, how in METHODS.items():
        out = folder / f"combined-{seed}"
        report = lt.stack(
            list(adapters.values()), out, method=label.partition(",")[0], overwrite=True, threads=1, **how
        )
        deltas = deltas_of(out)
        tried = {}
        for times in SIZES:
            losses = judge.with_change(deltas, times * wanted / norm(deltas), "dev")
            tried[times] = mean_share(losses, base["dev"], own["dev"])
        best = max(tried, key=tried.__getitem__)
        test = judge.with_change(deltas, best * wanted / norm(deltas), "test")
        share = mean_share(test, base["test"], own["test"])
        rows[label] = {
            "size": best,
            "test": test,
            "share": share,
            "dev": tried,
            "norm": norm(deltas) / wanted,
            "residual": report.totals.get("residual"),
        }
        print(seed, label, rows[label], flush=True)
    found = {"seed": seed, "base": base["test"], "alone": {task: each["test"] for task, each in alone.items()}}
    found |= {"methods": rows, "cosines": cosines(list(adapters.values()))}
    kept.write_text(json.dumps(found))
    return found


def cosines(adapters: Sequence[Path]) -> list[float]:
    """Of all pairs, over all modules."""
    import loratools as lt

    loaded = [lt.load_adapter(path) for path in adapters]
    return [one.cosine(other) for at, one in enumerate(loaded) for other in loaded[at + 1 :]]


def norm(deltas: Mapping[str, torch.Tensor]) -> float:
    """‖ΔW‖ over all modules."""
    return sum(float(each.double().square().sum()) for each in deltas.values()) ** 0.5


def main(words: Sequence[str]) -> None:
    """Train, combine, judge."""
    from tests import minilm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="other than all: kept in DIR only")
    parser.add_argument("--only-train", action="store_true")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    base = asked.work / "base"
    if not base.exists():
        minilm.unpack(base)
    judge = Judge(base)
    if asked.only_train:
        for seed in asked.seeds:
            for task in TASKS:
                print(judge.trained(task, seed, asked.work / f"{task}-{seed}"), flush=True)
        return
    found = [one_seed(judge, seed, asked.work) for seed in asked.seeds]
    if found and asked.seeds != list(SEEDS):
        return
    record = {
        "schema": "loratools/benchmark-combining/1",
        "machine": measure.machine(),
        "commit": measure.commit(REPOSITORY),
        "date": measure.now(),
        "versions": measure.versions(sys.executable),
        "setting": {"rank": RANK, "steps": STEPS, "choices": CHOICES},
        "pairs": {task: {part: len(each) for part, each in judge.texts[task].items()} for task in TASKS},
        "seeds": found,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
