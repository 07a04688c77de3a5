"""`loratools stack`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options, plans, reports
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "stack",
    examples="""
    loratools stack style/ character/ -o both/
    loratools stack style/ character/ -w 0.7 -w -0.3 -o both/
    loratools stack style/ character/ --rank 16 -o both/
    loratools stack maths/ code/ chat/ --method ties --density 0.3 --rank 32 -o all/
    """,
)
@options.adapters
@options.weights
@options.method
@options.ranks
@options.activations
@options.selecting
@options.adapter_format
@options.shapes
@options.writing
def command(out: Output, adapters: tuple[str, ...], output: str, *, dry_run: bool, **asked: Any) -> None:
    """Write the adapter whose ΔW is Σ w ΔW of the given ones: ranks are concatenated, nothing is lost.

    With one of the options for ranks, the best approximation of that instead; with --method, what that makes of them.
    """
    from loratools.verbs.stack import plan_stack, stack

    if dry_run:
        out.answer(plan_stack(adapters, output, **asked), plans.plan)
        return
    with bytes_done(shown=out.progress) as listener:
        report = stack(adapters, output, listener=listener, **asked)
    out.report(report, reports.derived)
