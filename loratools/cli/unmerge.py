"""`loratools unmerge`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options, plans, reports
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "unmerge",
    examples="""
    loratools unmerge merged/ -o restored/
    loratools unmerge merged/ style/ -o without-style/
    loratools unmerge merged/ adapter/ --base base/ -o restored/
    loratools unmerge merged/ adapter/ -w 0.7 -o subtracted/
    """,
)
@options.merged
@options.any_adapters
@options.weights
@options.original
@options.writing
@options.device
def command(out: Output, merged: str, output: str, *, dry_run: bool, **asked: Any) -> None:
    """Take adapters out of a merged checkpoint.

    From the receipt of the merge, or with --base, the result is the base's bytes, checked; with
    adapters named, the others are merged into it again. Without either, ΔW is subtracted, and the
    report says how far that can be from what was there.
    """
    from loratools.verbs.unmerge import plan_unmerge, unmerge

    if dry_run:
        out.answer(plan_unmerge(merged, output, **asked), plans.plan)
        return
    with bytes_done(shown=out.progress) as listener:
        report = unmerge(merged, output, listener=listener, **asked)
    out.report(report, reports.unmerge)
