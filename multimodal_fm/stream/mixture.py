"""The order of the stream: which sample is read when, a pure function of (seed, phases, position) in constant time.

Each task has its own positions 0, 1, 2, ...; step s takes `[s * batch_size, (s + 1) * batch_size)` of them. A block of
`BLOCK` positions is apportioned to the sources by their weights, exactly, in pseudo-random order. Within a source every
epoch is a pseudo-random permutation of its samples (a Feistel network, which has nothing to keep in memory or to save).
Where the weights change a new *phase* begins, in which each source goes on from where it was.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

BLOCK = 4096  # positions that are apportioned exactly
STRETCH = 1024  # positions that are computed at a time: for a few, the calls would cost more than the numbers
ROUNDS = 6  # of the Feistel network
WINDOW = 16_384  # samples that are permuted among themselves where chunks are kept together
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # the constants of splitmix64
_MASK = 2**64 - 1


def mix(*words: int) -> int:
    """A 64-bit hash of the words (the finalizer of splitmix64, Steele et al. 2014)."""
    state = 0
    for word in words:
        state = (state + word + _GAMMA) & _MASK
        state = (state ^ (state >> 30)) * _MIX_1 & _MASK
        state = (state ^ (state >> 27)) * _MIX_2 & _MASK
        state ^= state >> 31
    return state


def mix_more(state, words) -> np.ndarray:
    """`mix` of the words that gave `state` and of one more, as uint64 (N,). Either argument may be an array (N,)."""
    mixed = np.asarray(words, np.uint64) + np.asarray(state, np.uint64) + np.uint64(_GAMMA)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MIX_1)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MIX_2)
    return mixed ^ (mixed >> np.uint64(31))


def stable_hash(text: str) -> int:
    """A 63-bit hash of a text that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where the permutation of range(size) that `key` picks sends `indices` (N,), in constant time and memory each.

    A balanced Feistel network over the next even power of two, applied again to what falls outside of the range.
    """
    half, low, keys = _feistel(size, key)
    permuted = np.asarray(indices, dtype=np.uint64).copy()
    outside = np.arange(len(permuted))
    while len(outside):
        left, right = permuted[outside] >> half, permuted[outside] & low
        for round_key in keys:
            left, right = right, left ^ (mix_more(round_key, right) & low)
        permuted[outside] = left << half | right
        outside = outside[permuted[outside] >= np.uint64(size)]
    return permuted.astype(np.int64)


def invert_permute(image: int, size: int, key: int) -> int:
    """The index that `permute` sends to `image`."""
    half, low, keys = _feistel(size, key)
    index = np.array([image], dtype=np.uint64)
    while True:
        left, right = index >> half, index & low
        for round_key in reversed(keys):
            left, right = right ^ (mix_more(round_key, left) & low), left
        index = left << half | right
        if index[0] < size:
            return int(index[0])


def _feistel(size: int, key: int) -> tuple[np.uint64, np.uint64, list[int]]:
    """Bits of a half, the mask of the lower half, and the keys of the rounds."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    return half, np.uint64((1 << int(half)) - 1), [mix(key, turn) for turn in range(ROUNDS)]


def shuffle(indices: np.ndarray, size: int, chunk: int, key: int) -> np.ndarray:
    """The samples (N,) at `indices` (N,) of an epoch over `size` samples.

    With chunk=1 any sample may stand anywhere. Else chunks of so many neighbors are permuted (the short last one among
    them), and then the samples of each window of `WINDOW` among themselves, so that what is read at about the same time
    lies in few ranges of the shards.
    """
    if chunk == 1:
        return permute(indices, size, key)
    window, offset = np.divmod(indices, WINDOW)
    spread = np.empty_like(indices)
    for number in np.unique(window):
        inside = window == number
        length = min(WINDOW, size - int(number) * WINDOW)
        spread[inside] = number * WINDOW + permute(offset[inside], length, mix(key, 1, int(number)))
    chunks, missing = -(-size // chunk), -size % chunk
    short = invert_permute(chunks - 1, chunks, mix(key, 0))  # where the last chunk went; what follows moves up
    spread = np.where(spread >= (short + 1) * chunk - missing, spread + missing, spread)
    slot, offset = np.divmod(spread, chunk)
    return permute(slot, chunks, mix(key, 0)) * chunk + offset


def apportion(weights: list[float], block: int = BLOCK) -> list[int]:
    """Integers in proportion to the weights that add up to `block` (largest remainder), at least 1 for a weight > 0."""
    total = sum(weights)
    exact = [block * weight / total for weight in weights]
    quotas = [max(int(e), 1 if weight > 0 else 0) for e, weight in zip(exact, weights, strict=True)]
    by_remainder = sorted(range(len(weights)), key=lambda i: quotas[i] - exact[i])
    for i in range(block - sum(quotas)):
        quotas[by_remainder[i % len(quotas)]] += 1
    while sum(quotas) > block:
        quotas[quotas.index(max(quotas))] -= 1
    return quotas


@dataclass(frozen=True)
class Source:
    """What the order depends on. Its order is a function of its name, whatever other sources there are."""

    name: str
    size: int
    chunk: int = 1  # see `shuffle`


@dataclass(frozen=True)
class Draws:
    """What is read at some positions of the stream, arrays (N,)."""

    position: np.ndarray
    source: np.ndarray  # its number in the mixture
    epoch: np.ndarray  # of the source
    sample: np.ndarray


class Mixture:
    """The stream of one task.

    Args:
        phases: (first position, weight of each source), in order.
        start_counts: how many samples of each source were read before the first phase.
    """

    def __init__(self, seed: int, sources: list[Source], phases: list[tuple[int, list[float]]], start_counts=None):
        self.seed, self.sources = seed, sources
        self.starts = np.array([start for start, _ in phases])
        self.quotas = [apportion(weights) for _, weights in phases]
        self._block = functools.lru_cache(maxsize=8)(self._lay_out_block)
        self._stretch = functools.lru_cache(maxsize=8)(self._compute_stretch)
        self._start_counts = [np.array(start_counts or [0] * len(sources), np.int64)]  # at the start of each phase
        for start in self.starts[1:].tolist():
            self._start_counts.append(self.counts_before(start))

    def _lay_out_block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position of a block, and how many positions of that source precede it in the block."""
        order = permute(np.arange(BLOCK), BLOCK, mix(self.seed, int(self.starts[phase]), block))
        source = np.searchsorted(np.cumsum(self.quotas[phase]), order, "right")
        rank = np.empty(BLOCK, np.int64)
        for number in range(len(self.sources)):
            own = np.flatnonzero(source == number)
            rank[own] = np.arange(len(own))
        return source, rank

    def counts_before(self, position: int) -> np.ndarray:
        """How many samples of each source are read before `position`."""
        phase = max(int(np.searchsorted(self.starts, position, "left")) - 1, 0)
        block, offset = divmod(position - int(self.starts[phase]), BLOCK)
        counts = self._start_counts[phase] + block * np.array(self.quotas[phase])
        if offset:
            counts = counts + np.bincount(self._block(phase, block)[0][:offset], minlength=len(self.sources))
        return counts

    def draws(self, start: int, stop: int) -> Draws:
        """What is read at the positions from `start` to `stop`."""
        if start < self.starts[0]:
            raise ValueError(f"position {start} is before the first phase, which begins at {self.starts[0]}")
        stretches = [self._stretch(number) for number in range(start // STRETCH, -(-stop // STRETCH))]
        begin = int(stretches[0].position[0])
        columns = zip(*(vars(stretch).values() for stretch in stretches), strict=True)
        return Draws(*(np.concatenate(column)[start - begin : stop - begin] for column in columns))

    def _compute_stretch(self, stretch: int) -> Draws:
        positions = np.arange(max(stretch * STRETCH, self.starts[0]), (stretch + 1) * STRETCH)
        phases = np.searchsorted(self.starts, positions, "right") - 1
        source, count = np.empty_like(positions), np.empty_like(positions)  # count: of the source's samples before
        blocks = (positions - self.starts[phases]) // BLOCK
        for phase, block in dict.fromkeys(zip(phases.tolist(), blocks.tolist(), strict=True)):
            inside = (phases == phase) & (blocks == block)
            offset = positions[inside] - self.starts[phase] - block * BLOCK
            sources, rank = self._block(phase, block)
            source[inside] = sources[offset]
            base = self._start_counts[phase] + block * np.array(self.quotas[phase])
            count[inside] = base[sources[offset]] + rank[offset]
        epoch, index = np.divmod(count, np.array([one.size for one in self.sources])[source])
        sample = np.empty_like(index)
        for number, turn in dict.fromkeys(zip(source.tolist(), epoch.tolist(), strict=True)):
            inside = (source == number) & (epoch == turn)
            own = self.sources[number]
            key = mix(self.seed, stable_hash(own.name), turn)
            sample[inside] = shuffle(index[inside], own.size, own.chunk, key)
        return Draws(positions, source, epoch, sample)

    def substitute(self, source: int, position: int, attempt: int) -> int:
        """Another sample of the same source, for a position whose sample cannot be used."""
        return mix(self.seed, position, attempt) % self.sources[source].size
