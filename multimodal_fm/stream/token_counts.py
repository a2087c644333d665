"""Counts the tokens of samples from the index of their shards, without reading the samples."""

from __future__ import annotations

import contextlib
import random

import numpy as np

from ..corpus.shards import Corpus
from ..errors import SampleError
from ..tokenizers.base import Tokenizer

MEAN_SAMPLES = 20_000  # that a mean is taken over, at most
WHOLE_SAMPLES = 100  # that are read to tell how long they are
RATE_SAMPLES = 2_000  # that are read where a tokenizer cannot count from the index


class TokenCounter:
    """At most how many tokens the samples of a corpus have in a task's modalities."""

    def __init__(self, corpus: Corpus, modalities: list[str], tokenizers: dict[str, Tokenizer]):
        self.corpus, self.tokenizers = corpus, {modality: tokenizers[modality] for modality in modalities}
        self._rates: dict[str, tuple[float, float]] = {}

    def mean(self, samples) -> float:
        """The mean over the samples, or over some of them where they are many."""
        return float(np.mean([self.count(sample) for sample in _evenly_spaced(samples, MEAN_SAMPLES)]))

    def total(self, samples) -> float:
        """All tokens of the samples, those too that one visit's window of a long sample leaves out."""
        chosen = _evenly_spaced(samples, WHOLE_SAMPLES)
        return float(np.mean([max(self.count(sample), self._count_windows(sample)) for sample in chosen])) * len(
            samples
        )

    def _count_windows(self, sample: int) -> int:
        """The tokens of the windows that cover a sample; 0 where it cannot be read."""
        total = 0
        for tokenizer in self.tokenizers.values():
            with contextlib.suppress(SampleError):
                raw = self.corpus.raw(sample, tokenizer.extensions)
                total += sum(map(len, tokenizer.read(raw))) if raw else 0
        return total

    def count(self, sample: int) -> float:
        """The tokens of one sample, at least 1."""
        total, members = 0.0, self.corpus.measures(sample)
        for modality, tokenizer in self.tokenizers.items():
            own = [members[extension] for extension in tokenizer.extensions if extension in members]
            if not own:
                continue
            tokens = tokenizer.count_tokens(*(np.array([value]) for value in own[0]))
            if tokens is not None:
                total += float(tokens[0])
            else:
                rate, most = self._estimate_rate(modality)
                total += min(most, rate * sum(length for length, _, _ in own))
        return max(total, 1.0)

    def _estimate_rate(self, modality: str) -> tuple[float, float]:
        """Tokens a byte, and the most tokens of a sample, from an even selection of the corpus."""
        if modality not in self._rates:
            tokenizer, counts = self.tokenizers[modality], []
            for sample in _evenly_spaced(range(len(self.corpus)), RATE_SAMPLES):
                raw = self.corpus.raw(sample, tokenizer.extensions)
                try:
                    views = tokenizer.read(raw, random.Random(sample)) if raw else []
                except SampleError:
                    continue
                if views:
                    counts.append((len(views[0]), sum(map(len, raw.values()))))
            most = max((tokens for tokens, _ in counts), default=1)
            uncut = [(tokens, length) for tokens, length in counts if tokens < most]
            uncut = uncut or [(most, min((length for _, length in counts), default=1))]
            tokens, length = (sum(column) for column in zip(*uncut, strict=True))
            self._rates[modality] = (tokens / max(length, 1), float(most))
        return self._rates[modality]


def _evenly_spaced(samples, most: int) -> list[int]:
    """At most `most` of the samples, evenly spaced."""
    if len(samples) <= most:
        return [int(sample) for sample in samples]
    return [int(samples[i * len(samples) // most]) for i in range(most)]
