"""`loratools merge`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options, plans, reports
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "merge",
    examples="""
    loratools merge base/ adapter/ -o merged/
    loratools merge base/ style/ character/ -w 0.7 -w 0.5 -o merged/ --dry-run
    loratools merge base/ adapter/ --receipt-for elsewhere/ -o elsewhere/loratools.receipt
    loratools merge base/ -o recast/ --dtype bf16 --max-shard-size 5GB
    loratools merge base/ adapter/ -o merged/ --resume work/
    """,
)
@options.base
@options.any_adapters
@options.weights
@options.dtype
@options.max_shard_size
@options.receipt
@options.receipt_for
@options.resume
@options.writing
@options.device
def command(out: Output, base: str, adapters: tuple[str, ...], output: str, *, dry_run: bool, **asked: Any) -> None:
    """Write round(W + Σ w ΔW) for each weight that the adapters change; copy the rest byte for byte.

    Without an adapter, recast (--dtype) or reshard (--max-shard-size). OUT is a directory, or a
    .safetensors file for a checkpoint of one file. A receipt lies in it, or beside it, from which
    `loratools unmerge` gives the base back bit for bit. With --resume, a run that ends early keeps in
    WORKDIR what is done, and the same command goes on from there.
    """
    from loratools.verbs.merge import merge, plan_merge

    if dry_run:
        out.answer(plan_merge(base, adapters, output, **asked), plans.plan)
        return
    with bytes_done(shown=out.progress) as listener:
        report = merge(base, adapters, output, listener=listener, **asked)
    out.report(report, reports.merge)
