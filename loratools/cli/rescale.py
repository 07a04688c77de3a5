"""`loratools rescale`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options, plans, reports
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "rescale",
    examples="""
    loratools rescale adapter/ --by 0.8 -o weaker/
    loratools rescale adapter/ --norm 1 -o capped/
    loratools rescale adapter/ --blocks 'layers.{0-15}=0.5' -o half/
    loratools rescale adapter/ --bake -o baked/
    """,
)
@options.adapter
@options.rescaling
@options.selecting
@options.adapter_format
@options.writing
def command(out: Output, adapter: str, output: str, *, dry_run: bool, **asked: Any) -> None:
    """Write an adapter with another strength (--by), or the same strength said in another way.

    Give exactly one of --by, --norm, --blocks, --restate-alpha and --bake; the last two leave ΔW as it is.
    Modules that the patterns leave out are kept as they are.
    """
    from loratools.verbs.rescale import plan_rescale, rescale

    if dry_run:
        out.answer(plan_rescale(adapter, output, **asked), plans.plan)
        return
    with bytes_done(shown=out.progress) as listener:
        report = rescale(adapter, output, listener=listener, **asked)
    out.report(report, reports.derived)
