"""The stream: which item is read when. A pure function of (seed, position), so that any step is reached at once.

Each section has its own sequence of positions 0, 1, 2, ...; step s takes `[s * take, (s + 1) * take)` of it. A block of
`BLOCK` positions is shared out among the sources by their weights, exactly; within a source every epoch is a
pseudo-random permutation of its items (a Feistel network, so that there is nothing to keep in memory or to save).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from .batch import Arranged, Batch, Item, count_asked, gather
from .errors import BadInput, Lost
from .shards import Corpus, lookup

BLOCK = 4096
ATTEMPTS = 16  # how many items are tried for a position before the step does without


def mix(*words: int) -> int:
    """A well-mixed 64-bit number of the words (the finaliser of splitmix64, Steele et al. 2014)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state


def number(text: str) -> int:
    """A 63-bit number of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes in the permutation of range(size) that `key` picks, in constant time and memory.

    Six rounds of a balanced Feistel network over the next even power of two, walked until it falls inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(6):
            left, right = right, left ^ (mix(key, turn, right) & low)
        index = left << half | right
        if index < size:
            return index


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
class Draw:
    """What stands at one position of the stream."""

    source: int
    epoch: int
    item: int


class Mixture:
    """The stream of one section over sources of given sizes and weights."""

    def __init__(self, seed: int, sizes: list[int], weights: list[float]):
        self.seed, self.sizes, self.shares = seed, sizes, quotas(weights)

    def draw(self, position: int) -> Draw:
        block, place = divmod(position, BLOCK)
        place = permute(place, BLOCK, mix(self.seed, block))
        for source, share in enumerate(self.shares):  # noqa: B007
            if place < share:
                break
            place -= share
        epoch, place = divmod(block * share + place, self.sizes[source])
        return Draw(source, epoch, permute(place, self.sizes[source], mix(self.seed, 1 + source, epoch)))

    def substitute(self, draw: Draw, position: int, attempt: int) -> Draw:
        """Another item of the same source, for a position whose own cannot be used."""
        item = mix(self.seed, position, attempt) % self.sizes[draw.source]
        return Draw(draw.source, draw.epoch, item)


@dataclass(frozen=True)
class Section:
    """One section's reader: what it takes a step, from which corpora, and how an item is arranged."""

    name: str
    take: int
    parts: list[str]
    corpora: list[Corpus]
    weights: list[float]
    arrange: object  # (Item, generator) -> Arranged


@dataclass(frozen=True)
class Step:
    """All microbatches of one step and what was lost on the way."""

    batches: list[Batch]
    lost: list[dict]
    keys: list[str]  # source/key of every item, in the stream's order


class Steps(torch.utils.data.Dataset):
    """`steps[s]` is step s, whoever asks for it: the same for any number of workers."""

    def __init__(self, sections: list[Section], tokenizers: dict, seed: int, microbatches: int = 1, round_to: int = 1):
        self.sections, self.tokenizers, self.seed = sections, tokenizers, seed
        self.kinds, self.microbatches, self.round_to = list(tokenizers), microbatches, round_to
        self.usable = [[_usable(c, s.parts, tokenizers) for c in s.corpora] for s in sections]
        for section, usable in zip(sections, self.usable, strict=True):
            for corpus, items in zip(section.corpora, usable, strict=True):
                if not items:
                    parts = ", ".join(section.parts)
                    raise BadInput(f"section {section.name}: no item of source {corpus.name} has any of: {parts}")
        self.mixtures = [
            Mixture(mix(seed, number(s.name)), [len(i) for i in usable], s.weights)
            for s, usable in zip(sections, self.usable, strict=True)
        ]

    def __getitem__(self, step: int) -> Step:
        dealt = [{} for _ in range(self.microbatches)]
        counts, lost, keys = {}, [], []
        for which, section in enumerate(self.sections):
            taken = []
            for place in range(section.take):
                arranged = self._item(which, step * section.take + place, step, lost, keys)
                if arranged is not None:
                    taken.append((place, arranged))
            counts[section.name] = count_asked([one for _, one in taken], self.kinds)
            for turn, batch in enumerate(dealt):
                if own := taken[turn :: self.microbatches]:
                    batch[section.name] = own
        batches = [gather(batch, self.kinds, counts, self.round_to) for batch in dealt if batch]
        return Step(batches, lost, keys)

    def _item(self, which: int, position: int, step: int, lost: list, keys: list) -> Arranged | None:
        section, mixture = self.sections[which], self.mixtures[which]
        draw = mixture.draw(position)
        for attempt in range(ATTEMPTS):
            here = draw if not attempt else mixture.substitute(draw, position, attempt)
            corpus = section.corpora[here.source]
            index = self.usable[which][here.source][here.item]
            generator = torch.Generator()
            generator.manual_seed(mix(self.seed, number(section.name), here.source, here.epoch, index) >> 1)
            raw = corpus.raw(index)
            parts, failed = read_parts(raw, section.parts, self.tokenizers, generator)
            if not parts and not failed:
                failed = [("", Lost("empty", f"none of {', '.join(section.parts)} in it"))]
            lost += [ledger_row(corpus, index, kind, error, step + 1) for kind, error in failed]
            if parts:
                keys.append(f"{corpus.name}/{corpus.entries[index].key}")
                group = group_of(corpus, index, raw, self.tokenizers)
                return section.arrange(Item(parts, group), generator)
        return None


def read_parts(raw: dict, parts: list[str], tokenizers: dict, generator) -> tuple[dict, list[tuple[str, Lost]]]:
    """The item's parts, one view each, and those that cannot be read with the reason."""
    read, failed = {}, []
    for kind in parts:
        tokenizer = tokenizers[kind]
        members = {ending: data for ending, data in raw.items() if ending in tokenizer.module.extensions}
        try:
            views = tokenizer.module.read(tokenizer.settings, members, generator) if members else []
        except Lost as error:
            failed.append((kind, error))
            continue
        if views and len(views[0]):
            place = list(tokenizers).index(kind)
            read[kind] = views[0].replace(kind=torch.full((len(views[0]),), place))
    return read, failed


def ledger_row(corpus: Corpus, index: int, part: str, error: Lost, step: int | None) -> dict:
    entry = corpus.entries[index]
    return {
        "source": corpus.name,
        "shard": entry.shard,
        "key": entry.key,
        "part": part,
        "reason": error.reason,
        "detail": error.detail,
        "step": step,
    }


def group_of(corpus: Corpus, index: int, raw: dict, tokenizers: dict) -> int:
    """A number that items of one meaning share: the source's `group` field, else the text, else the item itself."""
    entry = corpus.entries[index]
    alone = number(f"{entry.shard}/{entry.key}")
    if corpus.config.group:
        value = lookup(corpus.json(index), corpus.config.group)
        return alone if value is None else number(f"field {value}")
    text = tokenizers.get("text")
    if text is None:
        return alone
    try:
        texts = text.module.things(text.settings, raw)
    except Lost:
        return alone
    return number(f"text {texts[0].strip().casefold()}") if texts else alone


def _usable(corpus: Corpus, parts: list[str], tokenizers: dict) -> list[int]:
    endings = {ending for kind in parts for ending in tokenizers[kind].module.extensions}
    return [i for i, entry in enumerate(corpus.entries) if not endings.isdisjoint(entry.members)]
