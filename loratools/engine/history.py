"""What a merged checkpoint's own report says about how it came to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import fingerprint, planning
from loratools.errors import MalformedError, MismatchError, UnsupportedError
from loratools.storage.files import sha256_of


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """The merge behind a checkpoint, if it was made by `loratools merge`.

    Attributes:
        adapters: (SHA-256 of the weights file, weight, base name) of every adapter that is in it, in order.
        modules: the base's tensors that the merge changed.
        fingerprints: of the base's weights, by tensor name.
        known: whether there is a report at all.
    """

    adapters: tuple[tuple[str, float, str], ...] = ()
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
            (_weights_hash(each.get("sha256", {})), float(weight), str(each.get("name", "")))
            for each, weight in zip(inputs, weights, strict=False)
        )
        modules = tuple(str(each["base"]) for each in report.get("modules", []) if "base" in each)
        return cls(adapters, modules, dict(report.get("base", {}).get("fingerprint", {})), known=True)

    def weights_for(self, adapters: Sequence[Adapter], weights: Sequence[float] | float | None) -> list[float]:
        """The weights with which adapters went in: as given, else as recorded, else 1 each.

        Raises:
            MismatchError: an adapter was not merged into this checkpoint, or with another weight.
        """
        given = planning.weights_for(len(adapters), weights) if adapters else []
        if not self.known:
            return given
        found = []
        for index, adapter in enumerate(adapters):
            digest = _digest(adapter)
            match = next((entry for entry in self.adapters if digest is not None and entry[0] == digest), None)
            if match is None:
                raise self._unknown(adapter, in_memory=digest is None)
            if weights is not None and given[index] != match[1]:
                raise MismatchError(
                    f"The adapter was merged with weight {match[1]}, not {given[index]}.",
                    fix="Leave -w out: the report knows the weights.",
                    adapter=adapter.name,
                )
            found.append(match[1])
        return found

    def _unknown(self, adapter: Adapter, *, in_memory: bool) -> MismatchError:
        merged = ", ".join(name for _, _, name in self.adapters)
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
        digests = [_digest(adapter) for adapter in adapters]
        staying = [name for digest, _, name in self.adapters if digest not in digests]
        if staying:
            raise UnsupportedError(
                f"{', '.join(staying)} would have to stay in, and the base alone does not hold it.",
                fix="Leave --base out to subtract only the named adapters, or merge the others into the base again.",
            )


def _weights_hash(files: Mapping[str, Any]) -> str:
    for name, digest in files.items():
        if name.endswith(".safetensors"):
            return str(digest)
    return ""


def _digest(adapter: Adapter) -> str | None:
    weights = [path for path in adapter.files if path.suffix == ".safetensors"]
    return sha256_of(Path(weights[0])) if weights else None
