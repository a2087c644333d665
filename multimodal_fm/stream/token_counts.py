"""How long are the samples? Told from the index, without reading them."""

from __future__ import annotations

import random

import numpy as np

from ..corpus.shards import Corpus
from ..errors import SampleError


class Ruler:
    """How many tokens the samples of a corpus have, at most, told from the index."""

    MOST = 20_000  # samples that a mean is taken of
    SAMPLE = 2_000  # samples that are read, for a modality whose tokenizer cannot tell from the index

    def __init__(self, corpus: Corpus, parts: list[str], tokenizers: dict):
        self.corpus, self.tokenizers = corpus, {modality: tokenizers[modality] for modality in parts}
        self._rates: dict[str, tuple[float, float]] = {}

    def mean(self, samples) -> float:
        """The mean over the samples (an even sample of them where they are many)."""
        chosen = _evenly(samples, self.MOST)
        return float(np.mean([self.of(sample) for sample in chosen]))

    def of(self, sample: int) -> float:
        """The tokens of one sample."""
        total, members = 0.0, self.corpus.measures(sample)
        for modality, tokenizer in self.tokenizers.items():
            own = [members[e] for e in tokenizer.extensions if e in members]
            if not own:
                continue
            length, a, b = (np.array([value]) for value in own[0])
            if (tokens := tokenizer.count_tokens(length, a, b)) is not None:
                total += float(tokens[0])
            else:
                rate, most = self._rate(modality)
                total += min(most, rate * sum(length for length, _, _ in own))
        return max(total, 1.0)

    def _rate(self, modality: str) -> tuple[float, float]:
        """Tokens a byte, and the most that any sample has, from an even sample of the corpus."""
        if modality not in self._rates:
            tokenizer, tokens, lengths = self.tokenizers[modality], [], []
            for sample in _evenly(range(len(self.corpus)), self.SAMPLE):
                raw = self.corpus.raw(sample, tokenizer.extensions)
                try:
                    views = tokenizer.read(raw, random.Random(sample)) if raw else []
                except SampleError:
                    continue
                if views:
                    tokens.append(len(views[0]))
                    lengths.append(sum(map(len, raw.values())))
            most = max(tokens, default=1)
            below = [(t, n) for t, n in zip(tokens, lengths, strict=True) if t < most]
            below = below or [(most, min(lengths, default=1))]
            self._rates[modality] = (sum(t for t, _ in below) / max(sum(n for _, n in below), 1), float(most))
        return self._rates[modality]


def _evenly(samples, most: int) -> list[int]:
    """At most `most` of the samples, evenly spaced."""
    if len(samples) <= most:
        return [int(sample) for sample in samples]
    return [int(samples[place * len(samples) // most]) for place in range(most)]
