"""How long are the items? Told from the index, without reading them."""

from __future__ import annotations

import random

import numpy as np

from ..corpus.shards import Corpus
from ..errors import Lost


class Ruler:
    """How many tokens the items of a corpus have, at most, told from the index."""

    MOST = 20_000  # items that a mean is taken of
    SAMPLE = 2_000  # items that are read, for a kind whose tokenizer cannot tell from the index

    def __init__(self, corpus: Corpus, parts: list[str], tokenizers: dict):
        self.corpus, self.tokenizers = corpus, {kind: tokenizers[kind] for kind in parts}
        self._rates: dict[str, tuple[float, float]] = {}

    def mean(self, items) -> float:
        """The mean over the items (an even sample of them where they are many)."""
        chosen = _evenly(items, self.MOST)
        return float(np.mean([self.of(item) for item in chosen]))

    def of(self, item: int) -> float:
        """The tokens of one item."""
        total, members = 0.0, self.corpus.measures(item)
        for kind, tokenizer in self.tokenizers.items():
            own = [members[e] for e in tokenizer.module.extensions if e in members]
            if not own:
                continue
            if hasattr(tokenizer.module, "count"):
                length, a, b = (np.array([value]) for value in own[0])
                total += float(tokenizer.module.count(tokenizer.settings, length, a, b)[0])
            else:
                rate, most = self._rate(kind)
                total += min(most, rate * sum(length for length, _, _ in own))
        return max(total, 1.0)

    def _rate(self, kind: str) -> tuple[float, float]:
        """Tokens a byte, and the most that any item has, from an even sample of the corpus."""
        if kind not in self._rates:
            tokenizer, tokens, lengths = self.tokenizers[kind], [], []
            for item in _evenly(range(len(self.corpus)), self.SAMPLE):
                raw = self.corpus.raw(item, tokenizer.module.extensions)
                try:
                    views = tokenizer.module.read(tokenizer.settings, raw, random.Random(item)) if raw else []
                except Lost:
                    continue
                if views:
                    tokens.append(len(views[0]))
                    lengths.append(sum(map(len, raw.values())))
            most = max(tokens, default=1)
            below = [(t, n) for t, n in zip(tokens, lengths, strict=True) if t < most]
            below = below or [(most, min(lengths, default=1))]
            self._rates[kind] = (sum(t for t, _ in below) / max(sum(n for _, n in below), 1), float(most))
        return self._rates[kind]


def _evenly(items, most: int) -> list[int]:
    """At most `most` of the items, evenly spaced."""
    if len(items) <= most:
        return [int(item) for item in items]
    return [int(items[place * len(items) // most]) for place in range(most)]
