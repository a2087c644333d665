import numpy as np
import pytest

from multimodal_fm.stream.mixture import (
    BLOCK,
    WINDOW,
    Mixture,
    Source,
    apportion,
    invert_permute,
    mix,
    permute,
    shuffle,
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_permutation_visits_everything_once(size):
    places = np.arange(size)
    assert sorted(permute(places, size, 5)) == list(range(size))
    if size > 7:
        assert list(permute(places, size, 5)) != list(permute(places, size, 6))


@pytest.mark.parametrize("size", [1, 5, 100, 4097])
def test_a_permutation_is_undone(size):
    there = permute(np.arange(size), size, 5)
    assert [invert_permute(int(sample), size, 5) for sample in there] == list(range(size))


@pytest.mark.parametrize(("size", "chunk"), [(1, 64), (63, 64), (1000, 64), (50_000, 64), (WINDOW * 2, 256), (7, 2)])
def test_chunks_visit_everything_once_and_stay_together(size, chunk):
    samples = shuffle(np.arange(size), size, chunk, 5)
    assert sorted(samples) == list(range(size))
    assert (samples == np.concatenate([shuffle(np.array([p]), size, chunk, 5) for p in range(min(size, 50))] +
                                    [samples[50:]])).all()  # fmt: skip
    if size > WINDOW:
        window = samples[:WINDOW] // chunk
        assert len(np.unique(window)) <= WINDOW // chunk + 1  # few ranges at a time,
        assert (np.abs(np.diff(samples[:WINDOW])) < chunk).mean() < 0.1  # and well mixed


def test_a_permutation_mixes():
    """Neighbours do not stay neighbours."""
    order = permute(np.arange(1000), 1000, 1)
    assert (np.abs(np.diff(order)) < 10).sum() < 60


def test_quotas_add_up():
    for weights in ([1], [1, 1, 1], [0.37, 0.63], [1e-9, 1], [5, 0, 1], [1] * 100):
        shares = apportion(weights)
        assert sum(shares) == BLOCK
        for share, weight in zip(shares, weights):
            assert abs(share - BLOCK * weight / sum(weights)) <= 1
            assert (share > 0) == (weight > 0)


SOURCES = [Source("large", 70_000), Source("small", 70), Source("middle", 3_000)]
WEIGHTS = [0.37, 0.13, 0.5]


def visits(draws, source):
    return np.bincount(draws.sample[draws.source == source], minlength=SOURCES[source].size)


def test_weights_are_exact_and_every_sample_equally_often():
    """One source is a thousand times smaller than another; at any point its samples were seen equally often, ± 1."""
    mixture = Mixture(3, SOURCES, [(0, WEIGHTS)])
    draws = mixture.draws(0, 50 * BLOCK)
    for source, weight in enumerate(WEIGHTS):
        assert abs((draws.source == source).mean() - weight) < 0.002
    for stop in (1, 777, BLOCK, 99_999, 50 * BLOCK):
        before = mixture.draws(0, stop)
        for source in range(3):
            counts = visits(before, source)
            assert counts.max() - counts.min() <= 1
        assert mixture.counts_before(stop).tolist() == np.bincount(before.source, minlength=3).tolist()


def test_any_position_is_reached_at_once():
    mixture = Mixture(3, [Source("a", 10**9), Source("b", 7)], [(0, [0.5, 0.5])])
    far, laid = 10**15, []
    mixture._block = lambda *which: laid.append(which) or mixture._lay_out_block(*which)
    draws = mixture.draws(far, far + 100)
    assert len(set(laid)) <= 2  # no block before is looked at
    assert len(set(draws.sample[draws.source == 0])) == (draws.source == 0).sum() > 20
    assert mixture.draws(far + 7, far + 8).sample[0] == draws.sample[7]


def test_a_new_phase_goes_on_where_each_source_was():
    phases = [(0, WEIGHTS), (9_999, [1, 0, 0]), (12_345, [0.2, 0.2, 0.6])]
    mixture = Mixture(3, SOURCES, phases)
    draws = mixture.draws(0, 100_000)
    assert (draws.source[9_999:12_345] == 0).all()
    assert abs((draws.source[12_345:] == 2).mean() - 0.6) < 0.002
    for source in range(3):
        counts = visits(draws, source)
        assert counts.max() - counts.min() <= 1
    for start in (0, 9_990, 12_340, 50_000):
        again = mixture.draws(start, start + 64)
        assert (again.sample == draws.sample[start : start + 64]).all()


def test_a_phase_that_begins_with_counts_is_the_one_that_came_from_there():
    """What a checkpoint keeps is enough: how much was drawn, not what was before."""
    whole = Mixture(3, SOURCES, [(0, WEIGHTS), (5_000, [0.1, 0.1, 0.8])])
    rest = Mixture(3, SOURCES, [(5_000, [0.1, 0.1, 0.8])], whole.counts_before(5_000).tolist())
    one, other = whole.draws(5_000, 15_000), rest.draws(5_000, 15_000)
    assert (one.sample == other.sample).all() and (one.epoch == other.epoch).all()


def test_another_source_beside_it_changes_no_order():
    """The order within a source hangs on its name alone."""
    alone = Mixture(3, SOURCES[2:], [(0, [1])]).draws(0, 3_000).sample
    among = Mixture(3, SOURCES, [(0, WEIGHTS)]).draws(0, 20_000)
    assert (among.sample[among.source == 2][:3_000] == alone).all()


def test_substitutes_are_of_the_same_source_and_determined():
    mixture = Mixture(3, [Source("a", 100), Source("b", 100)], [(0, [1, 1])])
    others = [mixture.substitute(1, 5, attempt) for attempt in range(1, 9)]
    assert len(set(others)) > 4 and all(0 <= other < 100 for other in others)
    assert others == [mixture.substitute(1, 5, attempt) for attempt in range(1, 9)]


def test_mix_is_the_same_everywhere():
    assert mix(1, 2, 3) == mix(1, 2, 3) != mix(3, 2, 1)
    bits = sum(bin(mix(7, i) ^ mix(7, i + 1)).count("1") for i in range(500)) / 500
    assert 30 < bits < 34
