"""`loratools extract`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options, plans, reports
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "extract",
    examples="""
    loratools extract base/ tuned/ -o adapter/ --rank 16
    loratools extract base/ tuned/ -o adapter/ --energy 0.95 --max-rank 64
    loratools extract base/ tuned/ -o adapter/ --budget 50MB
    loratools extract base/ tuned/ -o adapter/ --rank 8 --activations imatrix.gguf
    loratools extract base/ tuned/ -o adapter/ --include 'layers.{10-20}.*.q_proj' --dry-run
    """,
)
@options.base
@options.tuned
@options.extraction_rank
@options.preset
@options.activations
@options.save_full
@options.only_low_rank
@options.selecting
@options.new_format
@options.base_model
@options.seed
@options.writing
@options.device
def command(out: Output, base: str, tuned: str, output: str, *, dry_run: bool, **asked: Any) -> None:
    """Write ΔW = TUNED - BASE as an adapter: each changed matrix as a truncated SVD, the rest whole.

    Without a rank rule every module gets rank 16. Parameters whose bytes did not change are not stored.
    """
    from loratools.verbs.extract import extract, plan_extract

    if dry_run:
        out.answer(plan_extract(base, tuned, output, **asked), plans.plan)
        return
    with bytes_done(shown=out.progress) as listener:
        report = extract(base, tuned, output, listener=listener, **asked)
    out.report(report, reports.extract)
