"""`loratools diff`."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import options, plans
from loratools.cli.errors import NO
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "diff",
    examples="""
    loratools diff base/ tuned/
    loratools diff base/ tuned/ --spectrum --include '*_proj'
    loratools diff base/ copy/ -q && echo same
    loratools diff one-adapter/ another/ third/
    """,
)
@options.first
@options.second
@options.others
@options.spectrum
@options.spectrum_rank
@options.selecting
@options.observing
@options.device
def command(out: Output, a: str, b: str, others: tuple[str, ...], *, dry_run: bool, **asked: Any) -> None:
    """Say what two checkpoints or two adapters differ in, and by how much. Exit 0: nothing, 1: something.

    --spectrum decomposes every changed matrix once, and shows what an adapter would weigh and lose at every rank. More
    than two adapters: a matrix of their cosines, exit 0.
    """
    from loratools import rendering
    from loratools.verbs.diff import diff, plan_diff

    if dry_run:
        out.answer(plan_diff(a, b, *others, **asked), plans.plan)
        return
    with bytes_done(shown=out.progress) as listener:
        report = diff(a, b, *others, listener=listener, **asked)
    out.report(report, lambda report: rendering.difference(report).splitlines())
    if not report.same:
        raise click.exceptions.Exit(NO)
