"""Values of options: sizes, weights, outputs, patterns."""

import click
import pytest

from loratools.cli import values


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("4096", 4096), ("12B", 12), ("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1.5GiB", 3 * 2**29),
     ("2kb", 2000), ("3 TB", 3 * 10**12), ("1TiB", 2**40), ("9007199254740993", 9007199254740993)],
)  # fmt: skip
def test_sizes(text, nbytes):
    """Decimal and binary units, exactly; no unit is bytes."""
    assert values.size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1", "4Q", "GB", "1e9", "4G", "1,5GB", "٤GB", "0.1", "inf"])
def test_what_is_no_size(text):
    """What could mean two things, or nothing, is refused."""
    with pytest.raises(click.BadParameter, match="512MiB"):
        values.size(text)


@pytest.mark.parametrize("arguments", [
    ["merge", "base", "adapter", "-o", "x", "--max-memory", "4Q"],
    ["merge", "base", "adapter", "-o", "x", "--threads", "0"],
    ["merge", "base", "adapter", "-o", "hf://me/x"],
    ["merge", "base", "adapter", "-o", ""],
    ["merge", "base", "adapter", "-o", "x", "--resume", ""],
    ["merge", "base", "adapter", "-o", "x", "--resume", "hf://me/x"],
    ["merge", "base", "adapter", "-o", "x", "-w", "much"],
    ["merge", "base", "adapter", "-o", "x", "-w", "nan"],
    ["merge", "base", "adapter", "-o", "x", "-w", "1", "-w", "2"],
    ["merge", "base", "adapter", "-o", "x", "--dtype", "int4"],
    ["merge", "base", "adapter", "-o", "x", "--device", "abacus"],
    ["merge", "base", "-o", "x"],
    ["merge", "-o", "x"],
    ["merge", "base", "adapter"],
    ["stack", "-o", "x"],
    ["stack", "adapter", "-o", "x", "--method", "ties"],
    ["stack", "adapter", "-o", "x", "--include", "nothing_like_it"],
    ["stack", "adapter", "-o", "x", "--include", "re:("],
    ["rescale", "adapter", "-o", "x"],
    ["rescale", "adapter", "-o", "x", "--by", "2", "--bake"],
    ["extract", "base", "tuned", "-o", "x", "--rank", "2", "--energy", "0.5"],
    ["extract", "base", "tuned", "-o", "x", "--energy", "2"],
    ["extract", "base", "tuned", "-o", "x", "--preset", "magic"],
    ["extract", "base", "tuned", "-o", "x.safetensors"],
    ["inspect", "base", "--include", "nothing_like_it"],
    ["graph", "base", "--as", "html"],
    ["diff", "base"],
    ["diff", "base", "tuned", "--max-rank", "0"],
    ["diff", "base", "tuned", "--include", "nothing_like_it"],
    ["diff", "base", "tuned", "--spectrum", "--device", "abacus"],
    ["graph", "base", "--depth", "0"],
    ["push", "adapter", "not a repository"],
    ["demo", "unheard-of"],
    ["convert", "adapter", "-o", "x"],
])  # fmt: skip
def test_usage_errors(arguments, run, workdir, tree):
    """Exit 2, one paragraph on standard error, nothing on standard output, nothing written."""
    before = tree(workdir)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert tree(workdir) == before


def test_weights_may_be_negative_and_one_is_for_all(run, workdir):
    """`-w -0.5` is a value; one weight serves every adapter."""
    assert run("stack", "adapter", "adapter", "-w", "-0.5", "-o", "x", "-q").exit_code == 0
    assert run("stack", "adapter", "adapter", "-w", "1", "-w", "-0.5", "-o", "y", "-q").exit_code == 0
