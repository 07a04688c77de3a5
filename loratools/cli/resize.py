"""`loratools resize`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options, plans, reports
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "resize",
    examples="""
    loratools resize adapter/ --rank 8 -o smaller/
    loratools resize adapter/ --energy 0.99 -o smaller/
    loratools resize adapter/ --budget 20MB -o smaller/
    loratools resize adapter/ --rank 8 --rank-pattern 'layers.{0-3}.*=4' -o smaller/
    """,
)
@options.adapter
@options.ranks
@options.activations
@options.selecting
@options.adapter_format
@options.shapes
@options.writing
def command(out: Output, adapter: str, output: str, *, dry_run: bool, **asked: Any) -> None:
    """Write the nearest adapter of lower rank, module by module: the best there is, by its factors alone.

    Give exactly one rule for the ranks. Modules that the patterns leave out are kept as they are.
    """
    from loratools.verbs.resize import plan_resize, resize

    if dry_run:
        out.answer(plan_resize(adapter, output, **asked), plans.plan)
        return
    with bytes_done(shown=out.progress) as listener:
        report = resize(adapter, output, listener=listener, **asked)
    out.report(report, reports.derived)
