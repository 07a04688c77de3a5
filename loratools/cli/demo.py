"""`loratools demo`."""

from __future__ import annotations

from loratools.cli import options, reports
from loratools.cli.output import Output
from loratools.cli.progress import steps_done


@options.command(
    "demo",
    examples="""
    loratools demo
    loratools demo adapt -o story/ --seed 1
    """,
)
@options.story
@options.kept_output
@options.seed
def command(out: Output, story: str, output: str | None, seed: int) -> None:
    """Train a small network, fine-tune it, and extract, merge and unmerge adapters of several ranks.

    Nothing is downloaded. Without -o its files are deleted at the end.
    """
    from loratools.verbs.demo import demo

    with steps_done(shown=out.progress) as step:
        report = demo(story, output, seed=seed, on_event=lambda event: step(event.what, event.number - 1, event.total))
    out.answer(report, reports.demo)
