from collections import Counter

import pytest

from multimodal_fm.mixture import BLOCK, Mixture, mix, permute, quotas


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_permutation_visits_everything_once(size):
    assert sorted(permute(i, size, 5) for i in range(size)) == list(range(size))
    if size > 7:
        assert [permute(i, size, 5) for i in range(size)] != [permute(i, size, 6) for i in range(size)]


def test_a_permutation_mixes():
    """Neighbours do not stay neighbours."""
    order = [permute(i, 1000, 1) for i in range(1000)]
    assert sum(abs(a - b) < 10 for a, b in zip(order, order[1:])) < 60


def test_quotas_add_up():
    for weights in ([1], [1, 1, 1], [0.37, 0.63], [1e-9, 1], [5, 0, 1], [1] * 100):
        shares = quotas(weights)
        assert sum(shares) == BLOCK
        for share, weight in zip(shares, weights):
            assert abs(share - BLOCK * weight / sum(weights)) <= 1
            assert (share > 0) == (weight > 0)


def test_weights_are_exact_and_every_item_equally_often():
    mixture = Mixture(3, [1000, 7, 300], [0.37, 0.13, 0.5])
    draws = [mixture.draw(g) for g in range(5 * BLOCK)]
    sources = Counter(d.source for d in draws)
    for source, weight in enumerate([0.37, 0.13, 0.5]):
        assert abs(sources[source] / len(draws) - weight) < 0.002
        visits = Counter(d.item for d in draws if d.source == source)
        counts = [visits[i] for i in range(mixture.sizes[source])]
        in_epochs = Counter((d.epoch, d.item) for d in draws if d.source == source)
        assert max(in_epochs.values()) == 1
        assert max(counts) - min(counts) <= 2  # the last block's draws of one epoch are spread over the block


def test_any_position_is_reached_at_once():
    mixture = Mixture(3, [10**9, 7], [0.5, 0.5])
    far = 10**15
    assert mixture.draw(far) == mixture.draw(far) != mixture.draw(far + 1)
    assert len({mixture.draw(far + i).item for i in range(100) if mixture.draw(far + i).source == 0}) > 40


def test_substitutes_are_of_the_same_source_and_determined():
    mixture = Mixture(3, [100, 100], [1, 1])
    draw = mixture.draw(5)
    others = [mixture.substitute(draw, 5, attempt) for attempt in range(1, 9)]
    assert all(o.source == draw.source and o.epoch == draw.epoch for o in others) and len({o.item for o in others}) > 4
    assert others == [mixture.substitute(draw, 5, attempt) for attempt in range(1, 9)]


def test_mix_is_the_same_everywhere():
    assert mix(1, 2, 3) == mix(1, 2, 3) != mix(3, 2, 1)
    bits = sum(bin(mix(7, i) ^ mix(7, i + 1)).count("1") for i in range(500)) / 500
    assert 30 < bits < 34
