"""The page on the kernel is what its stored result gives."""

import json

from tests.benchmarks import kernel, kernel_page


def test_the_page_is_what_the_result_gives():
    """Nobody types a number."""
    assert kernel_page.PAGE.read_text(encoding="utf-8") == kernel_page.page()


def test_the_result_covers_the_grid():
    """Every shape, spectrum and rank, each against the full decomposition and its peers."""
    cells = json.loads(kernel_page.RESULT.read_text(encoding="utf-8"))["cells"]
    wanted = {(shape, kind, rank) for shape in kernel.SHAPES for kind in kernel.KINDS for rank in kernel.RANKS}
    assert {(cell["shape"], cell["kind"], cell["rank"]) for cell in cells} == wanted
    assert all(set(cell["seconds"]) == {"default", "matched", "fast", "svd_lowrank", "sklearn"} for cell in cells)


def test_gaps_are_those_that_the_presets_promise():
    """The largest gap of the default, and no certificate below the true gap beyond rounding."""
    for cell in json.loads(kernel_page.RESULT.read_text(encoding="utf-8"))["cells"]:
        assert cell["gap"]["default"] <= 1e-3 + 1e-5, cell
        if cell["certificate"] is not None:
            assert cell["certificate"] >= cell["gap"]["default"] - 1e-5, cell
