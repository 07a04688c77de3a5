"""The story `adapt`: a network learns upright digits, is fine-tuned to turned ones, and the change becomes an adapter.

Both checkpoints are written to files. For each rank the adapter is extracted, inspected, merged
into the base and taken out again, by the public verbs; every figure below is measured on the
tensors that lie on the disk afterwards, never taken from a report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import torch

from loratools.demo.digits import Digits, load_digits
from loratools.demo.networks import (
    WEIGHTS_NAME,
    accuracy,
    checkpoint_hashes,
    initial_weights,
    load_checkpoint,
    save_checkpoint,
)
from loratools.demo.training import FINE_TUNE, FROM_SCRATCH, train
from loratools.errors import UsageError

RANKS: Final = (1, 2, 4, 8, 16)
TEST_IMAGES: Final = 600
ADAPTER_NAME: Final = "adapter_model.safetensors"


class Report(Protocol):
    """What a verb returns."""

    def to_json(self) -> Mapping[str, object]:
        """The report as a JSON document."""


class Extract(Protocol):
    """`loratools.extract`, as far as the story needs it."""

    def __call__(self, base: Path, tuned: Path, output: Path, /, *, rank: int) -> Report:
        """Write the adapter of this rank that turns `base` into `tuned`."""


class Unmerge(Protocol):
    """`loratools.unmerge`, as far as the story needs it."""

    def __call__(self, merged: Path, output: Path, /, *, adapters: list[Path], base: Path) -> Report:
        """Write the base that `merged` was made of."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verbs:
    """The public verbs that the story uses; they lie above this package, so they are handed in.

    Attributes:
        extract: `extract(base, tuned, output, rank=...)`.
        merge: `merge(base, adapters, output)`.
        unmerge: `unmerge(merged, output, adapters=..., base=...)`, which checks the merge and restores the base.
        inspect: `inspect(source)`; its JSON has `parameters`.
    """

    extract: Extract
    merge: Callable[[Path, list[Path], Path], Report]
    unmerge: Unmerge
    inspect: Callable[[Path], Report]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One step of the story has begun: what it is, its number from 1 on, and how many there are."""

    what: str
    number: int
    total: int


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """A whole checkpoint: the base, or the fine-tuned one.

    Attributes:
        bytes: size of the weights file.
        parameters: numbers in it.
        upright: accuracy on upright test digits, 0 to 1.
        turned: accuracy on turned test digits.
    """

    bytes: int
    parameters: int
    upright: float
    turned: float


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One rank.

    Attributes:
        rank: the rank asked for (a narrower matrix takes less).
        bytes: size of the adapter's weights file.
        parameters: numbers in it.
        captured: ‖Δ̂‖²/‖ΔW‖² over all matrices, Δ̂ being merged minus base.
        residual: ‖ΔW − Δ̂‖/‖ΔW‖ over all matrices.
        accuracy: the merged checkpoint's on turned test digits, 0 to 1.
        restored: whether unmerging gave every tensor of the base back, by sha256.
    """

    rank: int
    bytes: int
    parameters: int
    captured: float
    residual: float
    accuracy: float
    restored: bool


@dataclasses.dataclass(frozen=True, slots=True)
class AdaptResult:
    """What the story showed."""

    seed: int
    train_images: int
    test_images: int
    base: Network
    tuned: Network
    ranks: tuple[Row, ...]

    @property
    def restored(self) -> bool:
        """Whether every unmerge gave the base back bit for bit."""
        return all(row.restored for row in self.ranks)

    def to_json(self) -> dict[str, object]:
        """Plain data, in the order of the fields, and `restored`."""
        return {
            **dataclasses.asdict(self),
            "ranks": [dataclasses.asdict(row) for row in self.ranks],
            "restored": self.restored,
        }

    def table(self) -> list[tuple[str, ...]]:
        """The rows to print, the heading first: the base, each rank, the fine-tuned network."""
        heading = ("", "bytes", "captured", "residual", "accuracy", "unmerged = base")
        ranks = [
            (
                f"rank {row.rank}",
                f"{row.bytes:,}",
                f"{row.captured:.3f}",
                f"{row.residual:.3f}",
                f"{row.accuracy:.1%}",
                "yes" if row.restored else "NO",
            )
            for row in self.ranks
        ]
        first = ("base", f"{self.base.bytes:,}", "", "", f"{self.base.turned:.1%}", "")
        last = ("fine-tuned", f"{self.tuned.bytes:,}", "", "", f"{self.tuned.turned:.1%}", "")
        return [heading, first, *ranks, last]


class _Story:
    """One run: where its files lie, and which step it has come to."""

    def __init__(self, workdir: Path, verbs: Verbs, steps: int, on_event: Callable[[Step], None] | None) -> None:
        self.base, self.tuned = workdir / "base", workdir / "tuned"
        self._workdir, self._verbs, self._steps, self._on_event = workdir, verbs, steps, on_event
        self._begun = 0

    def begin(self, what: str) -> None:
        self._begun += 1
        if self._on_event is not None:
            self._on_event(Step(what, self._begun, self._steps))

    def teach(self, upright: Digits, turned: Digits, generator: torch.Generator) -> None:
        """Train both networks and write both checkpoints."""
        self.begin("train the base on upright digits")
        base = train(initial_weights(generator), upright, FROM_SCRATCH, generator)
        save_checkpoint(base, self.base)
        self.begin("fine-tune all of it on turned digits")
        save_checkpoint(train(base, turned, FINE_TUNE, generator), self.tuned)

    def try_rank(self, rank: int, test: Digits) -> Row:
        """Extract, inspect, merge and unmerge at one rank."""
        self.begin(f"extract, merge and unmerge at rank {rank}")
        adapter, merged, restored = (
            self._workdir / f"{kind}-rank-{rank}" for kind in ("adapter", "merged", "restored")
        )
        self._verbs.extract(self.base, self.tuned, adapter, rank=rank)
        self._verbs.merge(self.base, [adapter], merged)
        self._verbs.unmerge(merged, restored, adapters=[adapter], base=self.base)
        captured, residual = _fit(load_checkpoint(self.base), load_checkpoint(self.tuned), load_checkpoint(merged))
        return Row(
            rank=rank,
            bytes=(adapter / ADAPTER_NAME).stat().st_size,
            parameters=self.parameters(adapter),
            captured=captured,
            residual=residual,
            accuracy=accuracy(load_checkpoint(merged), test),
            restored=checkpoint_hashes(restored) == checkpoint_hashes(self.base),
        )

    def network(self, directory: Path, upright: Digits, turned: Digits) -> Network:
        """Judge a whole checkpoint."""
        weights = load_checkpoint(directory)
        size = (directory / WEIGHTS_NAME).stat().st_size
        return Network(size, self.parameters(directory), accuracy(weights, upright), accuracy(weights, turned))

    def parameters(self, source: Path) -> int:
        return int(str(self._verbs.inspect(source).to_json()["parameters"]))


def adapt(
    workdir: Path,
    verbs: Verbs,
    ranks: Sequence[int] = RANKS,
    seed: int = 0,
    on_event: Callable[[Step], None] | None = None,
) -> AdaptResult:
    """Tell the story; its files stay in `workdir`.

    Args:
        workdir: a directory without the story's files: `base`, `tuned` and, for each rank, `adapter-rank-N`,
            `merged-rank-N` and `restored-rank-N` are made in it.
        verbs: the public verbs.
        ranks: the ranks to extract at; used once each, in ascending order.
        seed: decides the split, the untrained weights and the order of the images.
        on_event: called as each step begins.

    Raises:
        UsageError: `ranks` is empty or holds a number below 1.
    """
    if not ranks or min(ranks) < 1:
        raise UsageError("The demo needs at least one rank, each 1 or more.", ranks=list(ranks))
    chosen = sorted(set(ranks))
    generator = torch.Generator().manual_seed(seed)
    train_set, test_set = load_digits().split(TEST_IMAGES, generator)
    story = _Story(workdir, verbs, steps=2 + len(chosen), on_event=on_event)
    story.teach(train_set, train_set.turned(), generator)
    return AdaptResult(
        seed=seed,
        train_images=len(train_set.labels),
        test_images=len(test_set.labels),
        base=story.network(story.base, test_set, test_set.turned()),
        tuned=story.network(story.tuned, test_set, test_set.turned()),
        ranks=tuple(story.try_rank(rank, test_set.turned()) for rank in chosen),
    )


def _fit(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """How much of the fine-tune the merge holds: captured and residual, over all matrices."""
    wanted = torch.cat([(tuned[name].double() - base[name].double()).flatten() for name in base])
    made = torch.cat([(merged[name].double() - base[name].double()).flatten() for name in base])
    norm = wanted.norm()
    return float((made.norm() / norm) ** 2), float((wanted - made).norm() / norm)
