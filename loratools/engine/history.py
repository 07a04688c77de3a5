"""What a merged checkpoint's own report says about how it came to be."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import fingerprint, planning
from loratools.errors import MalformedError, MismatchError, UndecidedError, UnsupportedError
from loratools.storage.files import sha256_of


def written_hashes(merged: Checkpoint) -> dict[str, str]:
    """What the checkpoint's own merge report says its weights files hash to, by base name."""
    if merged.report.get("schema") != "loratools/merge/1":
        return {}
    return {
        str(each.get("name")): str(each.get("sha256"))
        for each in merged.report.get("files") or []
        if isinstance(each, dict) and str(each.get("name", "")).endswith(".safetensors")
    }


class Part(NamedTuple):
    """One adapter of a merge: hash of its weights file, its weight, its base name, the hashes of all its files."""

    digest: str
    weight: float
    name: str
    files: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """The merge behind a checkpoint, if it was made by `loratools merge`.

    Attributes:
        adapters: every adapter that is in it, in order.
        modules: the base's tensors that the merge changed.
        fingerprints: of the base's weights, by tensor name.
        known: whether there is a report at all.
    """

    adapters: tuple[Part, ...] = ()
    modules: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    known: bool = False

    @classmethod
    def of(cls, merged: Checkpoint) -> Recorded:
        """Read it; a checkpoint without a report, or with another verb's, is simply not known.

        Raises:
            MalformedError: somebody edited it.
        """
        report = merged.report
        if report.get("schema") != "loratools/merge/1":
            return cls()
        try:
            return cls._parsed(report)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MalformedError(
                "The report of this checkpoint is not as `loratools merge` writes it.",
                fix="Get it again, or delete its loratools.json and name what was merged.",
                checkpoint=merged.name,
            ) from error

    @classmethod
    def _parsed(cls, report: Mapping[str, Any]) -> Recorded:
        weights = report.get("parameters", {}).get("weights", [])
        inputs = [each for each in report.get("inputs", []) if each.get("role") == "adapter"]
        adapters = tuple(
            Part(
                weights_hash(each.get("sha256", {})),
                float(weight),
                str(each.get("name", "")),
                frozenset(map(str, each.get("sha256", {}).values())),
            )
            for each, weight in zip(inputs, weights, strict=False)
        )
        modules = tuple(str(each["base"]) for each in report.get("modules", []) if "base" in each)
        return cls(adapters, modules, dict(report.get("base", {}).get("fingerprint", {})), known=True)

    def weights_for(self, adapters: Sequence[Adapter], weights: Sequence[float] | float | None) -> list[float]:
        """The weights with which adapters went in: as given, else as recorded, else 1 each.

        Raises:
            MismatchError: an adapter was not merged into this checkpoint, or otherwise.
            UndecidedError: it was merged more often than it is named, with different weights.
        """
        if not self.known:
            return planning.weights_for(len(adapters), weights) if adapters else []
        return [self.adapters[index].weight for index in self.indices_for(adapters, weights)]

    def indices_for(self, adapters: Sequence[Adapter], weights: Sequence[float] | float | None) -> list[int]:
        """Which of the recorded adapters these are; raises as `weights_for`."""
        given = planning.weights_for(len(adapters), weights) if adapters else []
        left, named = list(enumerate(self.adapters)), Counter(map(_digest, adapters))
        found = []
        for adapter, weight in zip(adapters, given, strict=True):
            digest = _digest(adapter)
            same = [each for each in left if digest is not None and each[1].digest == digest]
            if not same:
                raise self._unknown(adapter, in_memory=digest is None)
            if weights is None and named[digest] < sum(part.digest == digest for part in self.adapters):
                _require_one_weight(adapter, [part for _, part in same])
            match = next((each for each in same if weights is None or each[1].weight == weight), None)
            _require_as_merged(adapter, match and match[1], same[0][1].weight, weight)
            assert match is not None
            left.remove(match)
            found.append(match[0])
        return found

    def _unknown(self, adapter: Adapter, *, in_memory: bool) -> MismatchError:
        merged = ", ".join(part.name for part in self.adapters)
        what, fix = "was not merged into this checkpoint", f"According to its report, these were: {merged}."
        if in_memory:
            what, fix = "cannot be recognised: it was made in memory", "Give --base: then no adapter need be named."
        return MismatchError(f"This adapter {what}.", fix=fix, adapter=adapter.name)

    def require_base(self, base: Checkpoint) -> None:
        """Refuse a base that is not the one that was merged into.

        Raises:
            MismatchError: it is another.
        """
        differing = [
            name
            for name, expected in self.fingerprints.items()
            if name not in base or fingerprint.of(base[name]) != expected
        ]
        if differing:
            counted = f"{len(differing)} of {len(self.fingerprints)} weights differ"
            raise MismatchError(
                f"This is not the base that was merged into: {counted}.",
                base=base.name,
                first=differing[0],
            )

    def require_all(self, adapters: Sequence[Adapter]) -> None:
        """Refuse to leave adapters in while going back to the base.

        Raises:
            UnsupportedError: some recorded adapter is not among those to take out.
        """
        if not self.known or not adapters:
            return
        named = Counter(map(_digest, adapters))
        staying = []
        for part in self.adapters:
            if named[part.digest]:
                named[part.digest] -= 1
            else:
                staying.append(part.name)
        if staying:
            raise UnsupportedError(
                f"{', '.join(staying)} would have to stay in, and the base alone does not hold it.",
                fix="Leave --base out to subtract only the named adapters, or merge the others into the base again.",
            )


def _require_one_weight(adapter: Adapter, parts: Sequence[Part]) -> None:
    weights = sorted({part.weight for part in parts})
    if len(weights) > 1:
        raise UndecidedError(
            f"The adapter was merged several times, with the weights {', '.join(map(str, weights))}.",
            fix="Say with -w which one to take out, or name the adapter as often as it was merged.",
            adapter=adapter.name,
        )


def _require_as_merged(adapter: Adapter, part: Part | None, merged: float, given: float) -> None:
    if part is None:
        raise MismatchError(
            f"The adapter was merged with weight {merged}, not {given}.",
            fix="Leave -w out: the report knows the weights.",
            adapter=adapter.name,
        )
    if part.files != {sha256_of(path) for path in adapter.files}:
        raise MismatchError(
            "The adapter's factors were merged into this checkpoint, but the files beside them were others then.",
            fix="Its alpha may have changed: put the adapter_config.json of that time back, or give --base alone.",
            adapter=adapter.name,
        )


def weights_hash(files: Mapping[str, Any]) -> str:
    """The hash of the weights among an adapter's files."""
    for name, digest in files.items():
        if name.endswith(".safetensors"):
            return str(digest)
    return ""


def _digest(adapter: Adapter) -> str | None:
    weights = [path for path in adapter.files if path.suffix == ".safetensors"]
    return sha256_of(Path(weights[0])) if weights else None
