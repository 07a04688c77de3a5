"""All hostile inputs, in the order of their numbers."""

from tests.reliability.inputs import adapters, headers, indexes, kinds, odd, pairs, paths, pickles

MODULES = (headers, odd, indexes, paths, adapters, kinds, pairs, pickles)
TITLES = dict(sorted(item for module in MODULES for item in module.TITLES.items()))
CASES = tuple(sorted((case for module in MODULES for case in module.CASES), key=lambda case: case.number))

OPEN: dict[int, tuple[tuple[str, ...], str]] = {}
"""Number → which variants are answered otherwise yet, and why."""
PENDING = {
    case.name: OPEN[case.number][1]
    for case in CASES
    if case.number in OPEN and case.variant.startswith(OPEN[case.number][0])
}
"""Name of a case → why the package does not answer as it should yet."""
