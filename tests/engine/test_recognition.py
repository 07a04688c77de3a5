"""What the modules of a difference say together."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.engine.recognition import Evidence, recognise

KINDS = ("attention.self.query", "attention.self.key", "intermediate.dense", "output.dense")


def path(layer, kind):
    return f"encoder.layer.{layer}.{kind}"


def of(target, *sigma, ended=True, hidden=0.0, limit=384):
    return Evidence(target, tuple(sigma), ended, hidden, limit)


def merged(target, rank, *, step=3.0, more=()):
    """A slowly falling spectrum that ends with a step at `rank`, and a trace of rounding behind it."""
    return of(target, *(step * 1.05 ** (rank - at) for at in range(rank)), *more)


def falling(target, count, start=8.0, **options):
    """A spectrum that runs into the noise."""
    return of(target, *(start ** (1 - at / count) * 1.06 for at in range(count)), **options)


def everywhere(make):
    return [make(path(layer, kind), layer, kind) for layer in range(6) for kind in KINDS]


def test_a_module_gets_the_rank_that_the_others_end_at():
    """Fewer that stand out, a trace of rounding that stands out as well, and an odd end: all get 8."""
    evidence = everywhere(lambda target, layer, kind: merged(target, 8))
    evidence[3] = falling(evidence[3].target, 5)
    evidence[9] = merged(evidence[9].target, 8, more=(1.2, 1.1))
    evidence[11] = of(evidence[11].target)
    evidence[17] = merged(evidence[17].target, 6, step=2.0)
    found = recognise(evidence)
    assert found.what == "merge"
    assert found.ranks == {each.target: 8 for each in evidence}
    assert found.said == "a merge of rank 8 in 24 of 24 modules"


def test_kinds_have_ranks_of_their_own():
    """A rank_pattern: each kind at its rank; a kind that says nothing is left to its own edge where others differ."""
    ranks = dict(zip(KINDS, (8, 12, 6, None), strict=True))
    evidence = everywhere(
        lambda target, layer, kind: merged(target, ranks[kind]) if ranks[kind] else falling(target, 4, 2.0)
    )
    found = recognise(evidence)
    assert found.ranks == {path(layer, kind): ranks[kind] for layer in range(6) for kind in KINDS if ranks[kind]}
    assert found.said == "a merge of rank 6 in 6, 8 in 6, 12 in 6 of 24 modules"


def test_a_module_that_is_sure_of_itself_keeps_its_end():
    evidence = everywhere(lambda target, layer, kind: merged(target, 4 if layer == 0 else 8, step=20.0))
    assert recognise(evidence).ranks == {each.target: 4 if ".0." in each.target else 8 for each in evidence}


def test_where_modules_go_on_beyond_there_is_no_common_rank():
    """Half of a kind ends at 8, the other goes on: nothing is shared, in the kind or at all."""
    evidence = [merged(path(layer, KINDS[0]), 8 if layer % 2 else 20 + layer, step=2.0) for layer in range(8)]
    found = recognise(evidence)
    assert (found.what, found.ranks) == ("unknown", {})
    assert found.said == "no rank that the 8 modules share"


@pytest.mark.parametrize("rank", [1, 2])
def test_one_or_two_that_stand_out_are_no_common_rank(rank):
    """Updates of a fine-tune have one or two large values as well."""
    assert recognise(everywhere(lambda target, *_: merged(target, rank, step=5.0))).what == "unknown"


def test_a_cap_is_no_end():
    """Spectra that were cut off at the cap end at the same value; that is a full fine-tune, and no merge of rank 64."""
    evidence = everywhere(lambda target, *_: of(target, *([20.0] * 64), ended=False))
    assert recognise(evidence).what == "full fine-tune"


def test_what_is_left_over_tells_a_fine_tune():
    """Directions below the floor by the dozen: of a merge there are fewer."""
    some, many = (everywhere(lambda target, *_: falling(target, 20, hidden=hidden)) for hidden in (3.0, 12.0))  # noqa: B023
    assert recognise(some).what == "unknown"
    assert recognise(many).what == "full fine-tune"


def test_changed_norms_tell_a_fine_tune_unless_there_is_a_common_rank():
    little = everywhere(lambda target, *_: falling(target, 2, 3.0))
    assert recognise(little, (0, 50)).what == "unknown"
    assert recognise(little, (40, 50)).what == "full fine-tune"
    assert recognise(everywhere(lambda target, *_: merged(target, 8)), (40, 50)).what == "merge"


def test_nothing_and_one_module():
    assert (recognise([]).what, recognise([], (3, 3)).what) == ("unknown", "unknown")
    alone = recognise([merged("a.b", 8)])
    assert (alone.what, alone.ranks) == ("unknown", {})
    assert alone.said == "one module: nothing to compare it with"


def test_matrices_of_one_module_share_its_rank():
    """Stacked experts: the largest end that any is sure of, and never more than there is."""
    experts = [merged("mlp.experts.down_proj", rank, step=20.0) for rank in (8, 8, 8, 4)]
    assert recognise([*experts, merged("q", 8)]).ranks == {"mlp.experts.down_proj": 8, "q": 8}
    small = [of("a.0.b", 2.0, 2.0, 2.0, limit=3), *(merged(f"a.{at}.b", 5) for at in range(1, 6))]
    assert recognise(small).ranks["a.0.b"] == 3


def test_less_than_half_of_the_modules_is_no_merge():
    """One kind ends together, three do not: nothing is said of any."""
    evidence = everywhere(
        lambda target, layer, kind: merged(target, 8) if kind == KINDS[0] else falling(target, 30 + layer)
    )
    found = recognise(evidence)
    assert (found.what, found.ranks, found.shared) == ("unknown", {}, {})


def test_of_two_ranks_with_as_many_votes_the_larger_one_is_meant():
    """Three end at 12, three at 8: those may have hidden ones."""
    evidence = [merged(path(layer, KINDS[0]), (8, 12)[layer % 2], step=2.0) for layer in range(6)]
    for each in (evidence, evidence[::-1]):
        assert recognise(each).ranks == {path(layer, KINDS[0]): 12 for layer in range(6)}


def continuous(generator, target):
    """Values as they may come of a fine-tune: a random count, a random decay, a little noise on each."""
    count, power = generator.randint(0, 60), generator.uniform(0.3, 1.5)
    start = generator.uniform(1.1, 20)
    sigma = [start * (at + 1) ** -power * generator.uniform(0.97, 1.03) for at in range(count)]
    return of(target, *sorted((each for each in sigma if each > 1.06), reverse=True))


def test_random_continuous_spectra_are_no_merge():
    """Of 300 checkpoints of 24 modules, none is taken for a merge."""
    generator = random.Random(5)
    found = [recognise(everywhere(lambda target, *_: continuous(generator, target))).what for _ in range(300)]
    assert "merge" not in found


spectra = st.lists(st.floats(1.06, 100), max_size=12).map(lambda values: sorted(values, reverse=True))
checkpoints = st.lists(st.tuples(st.integers(0, 7), st.sampled_from(KINDS), spectra, st.booleans()), max_size=30).map(
    lambda rows: [of(path(layer, kind), *sigma, ended=ended) for layer, kind, sigma, ended in rows]
)


@given(checkpoints, st.randoms(use_true_random=False))
def test_the_order_of_modules_does_not_matter(evidence, generator):
    shuffled = list(evidence)
    generator.shuffle(shuffled)
    assert recognise(shuffled) == recognise(evidence)


@given(checkpoints, st.integers(3, 40), st.integers(3, 8))
def test_modules_that_agree_never_unsettle_a_rank(evidence, rank, more):
    """Once a kind shares a rank, more of it that end there change nothing for those that are there."""
    members = [merged(path(100 + at, KINDS[0]), rank) for at in range(4)]
    before = recognise(members)
    assert before.ranks == {each.target: rank for each in members}
    after = recognise([*members, *(merged(path(200 + at, KINDS[0]), rank) for at in range(more))])
    assert {each.target: after.ranks[each.target] for each in members} == before.ranks
    found = recognise([*members, *(each for each in evidence if each.kind != members[0].kind)])
    assert found.what != "merge" or {name: found.ranks[name] for name in before.ranks} == before.ranks


@given(checkpoints)
def test_ranks_are_of_modules_that_share_one_and_within_what_there_is(evidence):
    found = recognise(evidence)
    assert found.ranks.keys() == found.shared.keys() <= {each.target for each in evidence}
    assert bool(found.ranks) == (found.what == "merge")
    assert all(1 <= rank <= min(found.shared[name], 384) for name, rank in found.ranks.items())
    assert (found.what == "merge") <= (2 * len(found.shared) >= found.of)
