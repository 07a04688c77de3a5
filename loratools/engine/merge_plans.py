"""The plan of a merge, once it is known what happens to each tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loratools.engine import layout, planning, resuming
from loratools.engine.merge_units import MergePlanner
from loratools.engine.plan import Plan
from loratools.engine.planning import Run
from loratools.engine.receipts.draft import Draft

RULES: Final = {"one-rounding": "W' = round(W + Σ w ΔW), ΔW to 2e-7 of its size, rounded once to the output dtype"}


def plan_of(  # noqa: PLR0913
    planner: MergePlanner,
    path: Path,
    draft: Draft | None,
    options: Mapping[str, Any],
    notes: tuple[str, ...],
    run: Run,
    *,
    resume: str | os.PathLike[str] | None,
) -> Plan:
    """Files, units, bounds; the output and the room for it are checked.

    Args:
        planner: base and changes.
        path: the output.
        draft: of the receipt, or None.
        options: the request, as the report repeats it; `max_shard_size` among them.
        notes: what was decided so far.
        run: threads, limits.
        resume: a work directory, or None.

    Raises:
        LoratoolsError: as `planning.check_output` and `resuming.check`.
    """
    base, sources, single = planner.base, planner.sources, path.suffix == ".safetensors"
    files = planner.files(options["max_shard_size"], single=single, name=path.name)
    units = planning.hash_units(sources) + planner.units(files)
    headers = layout.output_files(files, base)
    written = sum(spec.nbytes for file in headers for spec in file.tensors)
    beside = 0 if single else sum(map(planning.size_of, base.companions))
    receipt = draft.estimate(units) if draft is not None else 0
    there = 0 if resume is None else resuming.check(resume, path, sources, headers)
    planning.check_output(path, run, sources.values(), max(written - there, 0) + beside + receipt)
    edits, edit_notes = layout.config_edits(
        base.config,
        dtype=planner.dtype,
        untied=planner.changes.untied is not None,
        rows=planner.vocabulary(),
        written=not single,
    )
    return Plan(
        verb="merge",
        kind="checkpoint",
        output=str(path),
        overwrite=run.overwrite,
        sources=planning.infos(sources),
        units=tuple(units),
        bounds=planning.bounds(units, sources.values(), run, write=written + beside),
        files=headers,
        copies=() if single else planner.copies(edited=bool(edits)),
        texts={} if single else planner.texts(headers, edits),
        options=options,
        rules=RULES,
        notes=(*notes, *edit_notes),
    )
