"""`loratools verify`."""

from __future__ import annotations

from typing import Any, Final

import click

from loratools.cli import options, reports
from loratools.cli.errors import NO, OK, OPEN
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done

_CODES: Final = {"holds": OK, "does not hold": NO, "cannot tell": OPEN}


@options.command(
    "verify",
    examples="""
    loratools verify output/
    loratools verify output/ base/ adapter/
    loratools verify merged/ --base base/ --adapter adapter/
    loratools verify merged/ --base base/ --adapter style/ --adapter character/ -w 0.7 -w 0.5
    """,
)
@options.checked
@options.inputs
@options.merged_into
@options.named_adapters
@options.weights
@options.max_memory
@options.threads
def command(out: Output, output: str, inputs: tuple[str, ...], **asked: Any) -> None:
    """Answer whether OUTPUT is what its report says. Exit 0: it is, 1: it is not, 3: cannot tell.

    Without an INPUT, its files are hashed; with all INPUTs of the report, it is derived from them anew.
    With --base, the question is whether a checkpoint, whoever made it, is BASE + Σ w ΔW, and how it was
    rounded: every tensor gets a verdict.
    """
    from loratools.verbs.verify import verify

    with bytes_done(shown=out.progress) as listener:
        report = verify(output, inputs, listener=listener, **asked)
    out.report(report, reports.verify)
    if code := _CODES[report.answer]:
        raise click.exceptions.Exit(code)
