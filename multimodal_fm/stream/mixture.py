"""The order of the stream: which sample is read when. A pure function of (seed, phases, position), reached at once.

Each task has its own sequence of positions 0, 1, 2, ...; step s takes `[s * batch_size, (s + 1) * batch_size)` of it. A block of
`BLOCK` positions is shared out among the sources by their weights, exactly, in pseudo-random order; within a source
every epoch is a pseudo-random permutation of its samples (a Feistel network, so that there is nothing to keep in memory
or to save). Where the weights change a new *phase* begins, in which each source goes on from where it was.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

BLOCK = 4096
STRETCH = 1024  # positions that are worked out at a time
ROUNDS = 6
WINDOW = 16_384  # places
_STEP, _ONE, _TWO = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FULL = 2**64 - 1


def mix(*words: int) -> int:
    """A well-mixed 64-bit number of the words (the finalizer of splitmix64, Steele et al. 2014)."""
    state = 0
    for word in words:
        state = (state + word + _STEP) & _FULL
        state = (state ^ (state >> 30)) * _ONE & _FULL
        state = (state ^ (state >> 27)) * _TWO & _FULL
        state ^= state >> 31
    return state


def mix_on(state, words) -> np.ndarray:
    """`mix` of the words that gave `state` and one more; one of the two, or both, an array (N,): uint64 (N,)."""
    mixed = np.asarray(words, np.uint64) + np.asarray(state, np.uint64) + np.uint64(_STEP)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_ONE)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_TWO)
    return mixed ^ (mixed >> np.uint64(31))


def number(text: str) -> int:
    """A 63-bit number of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def permute(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where `places` (N,) go in the permutation of range(size) that `key` picks, in constant time and memory a place.

    A balanced Feistel network over the next even power of two, walked until it falls inside.
    """
    half, low, keys = _network(size, key)
    found = np.asarray(places, dtype=np.uint64).copy()
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> half, found[outside] & low
        for round_key in keys:
            left, right = right, left ^ (mix_on(round_key, right) & low)
        found[outside] = left << half | right
        outside = outside[found[outside] >= np.uint64(size)]
    return found.astype(np.int64)


def place_of(sample: int, size: int, key: int) -> int:
    """The place that `permute` sends to `sample`: the network backwards."""
    half, low, keys = _network(size, key)
    found = np.array([sample], dtype=np.uint64)
    while True:
        left, right = found >> half, found & low
        for round_key in reversed(keys):
            left, right = right ^ (mix_on(round_key, left) & low), left
        found = left << half | right
        if found[0] < size:
            return int(found[0])


def _network(size: int, key: int) -> tuple[np.uint64, np.uint64, list[int]]:
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    return half, np.uint64((1 << int(half)) - 1), [mix(key, turn) for turn in range(ROUNDS)]


def shuffle(places: np.ndarray, size: int, chunk: int, key: int) -> np.ndarray:
    """The samples (N,) at `places` (N,) of one epoch over `size` samples, each sample at one place.

    With chunk 1 any sample may stand anywhere. Else runs of `chunk` neighbours are permuted, the short last one among
    them, and the samples of `WINDOW` places among themselves: what is read at a time lies in few ranges of the shards.
    """
    if chunk == 1:
        return permute(places, size, key)
    window, inside = np.divmod(places, WINDOW)
    spread = np.empty_like(places)
    for which in np.unique(window):
        here = window == which
        length = min(WINDOW, size - int(which) * WINDOW)
        spread[here] = which * WINDOW + permute(inside[here], length, mix(key, 1, int(which)))
    chunks, missing = -(-size // chunk), -size % chunk
    short = place_of(chunks - 1, chunks, mix(key, 0))  # where the last chunk went, from which all are `missing` early
    spread = np.where(spread >= (short + 1) * chunk - missing, spread + missing, spread)
    slot, offset = np.divmod(spread, chunk)
    return permute(slot, chunks, mix(key, 0)) * chunk + offset


def quotas(weights: list[float], block: int = BLOCK) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `block` (largest remainder); none is starved."""
    total = sum(weights)
    exact = [block * w / total for w in weights]
    shares = [max(int(e), 1 if w > 0 else 0) for e, w in zip(exact, weights, strict=True)]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in range(block - sum(shares)):
        shares[by_remainder[i % len(shares)]] += 1
    while sum(shares) > block:
        shares[shares.index(max(shares))] -= 1
    return shares


@dataclass(frozen=True)
class Source:
    """What the order needs to know of a source. By name, so that another one beside it changes nothing."""

    name: str
    size: int
    chunk: int = 1  # neighbours that stay near each other, see `shuffle`


@dataclass(frozen=True)
class Draws:
    """What stands at some positions of the stream, arrays (N,)."""

    position: np.ndarray
    source: np.ndarray  # which of the mixture's
    epoch: np.ndarray  # how many times the source has been gone through before
    sample: np.ndarray


class Mixture:
    """The stream of one task.

    phases: (first position, weight of each source), in order; there is nothing before the first. drawn: how many samples
    of each source were read before it.
    """

    def __init__(self, seed: int, sources: list[Source], phases: list[tuple[int, list[float]]], drawn=None):
        self.seed, self.sources = seed, sources
        self.starts = np.array([start for start, _ in phases])
        self.shares = [quotas(weights) for _, weights in phases]
        self._drawn = [np.array(drawn or [0] * len(sources), np.int64)]  # at each phase's start
        self._block = functools.lru_cache(maxsize=8)(self._lay_out)
        self._stretch = functools.lru_cache(maxsize=8)(self._work_out)
        for phase in range(1, len(phases)):
            self._drawn.append(self.drawn(int(self.starts[phase])))

    def _lay_out(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's positions: which source each is of, and the how-manieth of its source in the block."""
        order = permute(np.arange(BLOCK), BLOCK, mix(self.seed, int(self.starts[phase]), block))
        source = np.searchsorted(np.cumsum(self.shares[phase]), order, "right")
        rank = np.empty(BLOCK, np.int64)
        for which in range(len(self.sources)):
            own = np.flatnonzero(source == which)
            rank[own] = np.arange(len(own))
        return source, rank

    def drawn(self, position: int) -> np.ndarray:
        """How many samples of each source stand before `position`."""
        phase = max(int(np.searchsorted(self.starts, position, "left")) - 1, 0)
        block, place = divmod(position - int(self.starts[phase]), BLOCK)
        before = self._drawn[phase] + block * np.array(self.shares[phase])
        if place:
            before = before + np.bincount(self._block(phase, block)[0][:place], minlength=len(self.sources))
        return before

    def draws(self, start: int, stop: int) -> Draws:
        """What stands at the positions from `start` to `stop`."""
        found = [self._stretch(which) for which in range(start // STRETCH, -(-stop // STRETCH))]
        begin = int(found[0].position[0])
        columns = zip(*(vars(one).values() for one in found), strict=True)
        return Draws(*(np.concatenate(column)[start - begin : stop - begin] for column in columns))

    def _work_out(self, stretch: int) -> Draws:
        """A stretch of positions at a time: for a few, the calls would cost more than the numbers."""
        positions = np.arange(max(stretch * STRETCH, self.starts[0]), (stretch + 1) * STRETCH)
        phases = np.searchsorted(self.starts, positions, "right") - 1
        source, drawn = np.empty_like(positions), np.empty_like(positions)
        blocks = (positions - self.starts[phases]) // BLOCK
        for phase, block in dict.fromkeys(zip(phases.tolist(), blocks.tolist(), strict=True)):
            here = (phases == phase) & (blocks == block)
            place = positions[here] - self.starts[phase] - block * BLOCK
            whose, rank = self._block(phase, block)
            source[here] = whose[place]
            base = self._drawn[phase] + block * np.array(self.shares[phase])
            drawn[here] = base[whose[place]] + rank[place]
        sizes = np.array([one.size for one in self.sources])
        epoch, place = np.divmod(drawn, sizes[source])
        sample = np.empty_like(place)
        for which, turn in dict.fromkeys(zip(source.tolist(), epoch.tolist(), strict=True)):
            here = (source == which) & (epoch == turn)
            own = self.sources[which]
            sample[here] = shuffle(place[here], own.size, own.chunk, mix(self.seed, number(own.name), turn))
        return Draws(positions, source, epoch, sample)

    def substitute(self, source: int, position: int, attempt: int) -> int:
        """Another sample of the same source, for a position whose own cannot be used."""
        return mix(self.seed, position, attempt) % self.sources[source].size
