"""Counts a corpus from the indexes of its shards. Nothing is decoded but text inside JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..corpus.index import MEMBER, Index
from ..errors import SampleError
from ..tokenizers import audio, image, text
from .samples import read_members
from .verify import refused_rows

TEXT_SAMPLES = 10_000  # samples that are read to estimate how much text there is, where the index does not tell
REFUSED_SHOWN = 100
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


@dataclass
class Stats:
    """`data` is plain data for programs; `histograms` holds values (N,) and their weights (N,) by name, for figures."""

    data: dict
    histograms: dict[str, tuple[np.ndarray, np.ndarray]]


def count_corpus(indexes: list[Index], tokenizers: dict, config: str = "") -> Stats:
    """What the shards hold. Text inside JSON is read, of an even selection of the samples where there are many.

    `config` is the file that the tokenizers come from; empty: they have default settings.
    """
    words = next((modality for modality, one in tokenizers.items() if isinstance(one, text.Tokenizer)), None)
    certain = {modality: tokenizer.extensions for modality, tokenizer in tokenizers.items()}
    if words:  # a `txt` is text whatever it holds; a JSON has to be looked into
        fields = tokenizers[words].config.fields
        certain[words] = ("txt",) if isinstance(fields, list) and fields[0] == "txt" else ()
    held: Counter = Counter()  # samples by the modalities that they have
    uncertain: dict[tuple, list[tuple[Index, np.ndarray]]] = {}  # samples that may have text, by their other modalities
    for index in indexes:
        for number, (extensions, count) in enumerate(zip(index.extension_sets, index.head["counts"], strict=True)):
            has = tuple(modality for modality in tokenizers if not set(extensions).isdisjoint(certain[modality]))
            if words and words not in has and not set(extensions).isdisjoint(tokenizers[words].extensions):
                uncertain.setdefault(has, []).append((index, np.flatnonzero(index.extension_set_ids == number)))
            else:
                held[has] += count
    found, histograms = {}, {}
    for modality, tokenizer in tokenizers.items():
        members = np.concatenate([np.zeros(0, MEMBER), *(_first_members(one, certain[modality]) for one in indexes)])
        if words is not None and modality == words:
            texts, exact = _read_texts(tokenizer, members, uncertain, held, list(tokenizers), words)
            found[words] = _count_text(tokenizer, texts, exact, _tokens_per_byte(tokenizer, indexes))
            histograms["text"] = texts[:, 1], texts[:, 3]
        elif isinstance(tokenizer, image.Tokenizer):
            found[modality] = _count_images(tokenizer, members)
            width, height = (members[name][members["b"] > 0].astype(float) for name in "ab")
            histograms["resolution"] = np.sqrt(width * height), np.ones(len(width))
            histograms["aspect"] = width / np.maximum(height, 1), np.ones(len(width))
        elif isinstance(tokenizer, audio.Tokenizer):
            found[modality] = _count_audio(tokenizer, members)
            seconds = members["a"][members["b"] > 0] / 1000
            histograms["duration"] = seconds, np.ones(len(seconds))
        else:
            found[modality] = _count(tokenizer, members)
    modalities = {modality: one for modality, one in found.items() if one["samples"]}
    refused = [row for index in indexes for row in refused_rows(index)]
    return Stats(
        {
            "shards": len(indexes),
            "samples": sum(map(len, indexes)),
            "bytes": sum(one.head["size"] for one in indexes),
            "config": config or "defaults",
            "combinations": {" + ".join(has) or "nothing": round(n) for has, n in held.most_common() if round(n)},
            "together": _count_together(held, list(tokenizers)),
            "modalities": modalities,
            "tokens": sum(one.get("tokens", 0) for one in modalities.values()),
            "refused": {
                "count": sum(index.head["rejection_count"] for index in indexes),
                "reasons": dict(Counter(row["reason"] for row in refused).most_common()),
                "first": refused[:REFUSED_SHOWN],
            },
        },
        histograms,
    )


def _first_members(index: Index, extensions: tuple[str, ...]) -> np.ndarray:
    """The rows of `members` that a tokenizer reads: one a sample, that of the first of the extensions that it has."""
    sample = np.repeat(np.arange(len(index)), np.diff(index.member_starts))
    chosen = np.full(len(index), -1)
    for extension in reversed([e for e in extensions if e in index.extensions]):
        rows = np.flatnonzero(index.members["extension"] == index.extensions.index(extension))
        chosen[sample[rows]] = rows
    return np.array(index.members[chosen[chosen >= 0]])


def _count_together(held: Counter, modalities: list[str]) -> dict[str, int]:
    """How many samples have at least these modalities, for all sets of two or more that occur."""
    sets = [some for size in range(2, len(modalities) + 1) for some in combinations(modalities, size)]
    counts = {some: round(sum(n for has, n in held.items() if set(some) <= set(has))) for some in sets}
    return {" + ".join(some): count for some, count in counts.items() if count}


def _read_texts(tokenizer, members: np.ndarray, uncertain: dict, held: dict, modalities: list[str], words: str):
    """Rows (N, 4) of samples with text (bytes, bytes of a text on average, texts, samples that the row stands for), and
    whether all samples were read. The uncertain samples are added to `held`."""
    rows, exact = [], True
    for others, samples in uncertain.items():
        total, chosen = sum(len(numbers) for _, numbers in samples), spread(samples, TEXT_SAMPLES)
        exact, weight = exact and len(chosen) == total, total / len(chosen)
        for index, sample in chosen:
            lengths = [len(one.encode("utf-8", "surrogatepass")) for one in _texts(tokenizer, index, sample)]
            has = (*others, words) if lengths else others
            held[tuple(modality for modality in modalities if modality in has)] += weight
            if lengths:
                rows.append((sum(lengths), sum(lengths) / len(lengths), len(lengths), weight))
    length, ones = members["length"].astype(float), np.ones(len(members))
    return np.concatenate([np.stack([length, length, ones, ones], 1), np.array(rows, float).reshape(-1, 4)]), exact


def _texts(tokenizer, index: Index, sample: int) -> list[str]:
    """A sample's texts; none where they cannot be read."""
    try:
        return tokenizer.split_inputs(read_members(index, sample, tokenizer)[0])
    except SampleError:
        return []


def _tokens_per_byte(tokenizer, indexes: list[Index]) -> float | None:
    """Measured on 1,000 samples; None where the tokenizer has not been trained."""
    tokens, length = 0, 0
    if tokenizer.file:
        for index, sample in spread([(one, np.arange(len(one))) for one in indexes], 1000):
            for start in (one[:20_000] for one in _texts(tokenizer, index, sample)[:4]):
                tokens += len(tokenizer.encode(start))
                length += len(start.encode("utf-8", "surrogatepass"))
    return tokens / length if length else None


def spread(samples: list[tuple[Index, np.ndarray]], most: int) -> list[tuple[Index, int]]:
    """At most `most` of the samples, evenly spaced; they are given as (index, numbers of samples in it)."""
    bounds = np.cumsum([0, *(len(numbers) for _, numbers in samples)])
    total = int(bounds[-1])
    chosen = np.unique(np.linspace(0, total - 1, min(total, most)).astype(int)) if total else np.zeros(0, int)
    shards = np.searchsorted(bounds, chosen, "right") - 1
    return [(samples[s][0], int(samples[s][1][number - bounds[s]])) for s, number in zip(shards, chosen)]


def quantiles(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, int]:
    """Which of the values (N,) are the `QUANTILES`, as indexes; empty where there are no values."""
    if not len(values):
        return {}
    order = np.argsort(values, kind="stable")
    total = np.cumsum(np.ones(len(values)) if weights is None else weights[order])
    ranks = {name: np.searchsorted(total, share * total[-1] * (1 - 1e-12)) for name, share in QUANTILES.items()}
    return {name: int(order[min(rank, len(order) - 1)]) for name, rank in ranks.items()}


def _count(tokenizer, members: np.ndarray) -> dict:
    counts = {"samples": len(members), "bytes": int(members["length"].sum(dtype=np.int64))}
    tokens = _count_tokens(tokenizer, members)
    return counts if tokens is None else counts | {"tokens": int(tokens.sum())}


def _count_tokens(tokenizer, members: np.ndarray) -> np.ndarray | None:
    """Tokens (N,) of a training view of each member; None where the tokenizer does not know."""
    if not len(members):
        return np.zeros(0, np.int64)
    return tokenizer.count_tokens(members["length"], members["a"].astype(np.int64), members["b"].astype(np.int64))


def _count_text(tokenizer, texts: np.ndarray, exact: bool, tokens_per_byte: float | None) -> dict:
    total, mean, count, weight = texts.T
    known, limit = {} if tokens_per_byte is None else {"tokens_per_byte": tokens_per_byte}, tokenizer.config.max_tokens
    tokens = tokenizer.estimate_tokens(mean, **known)
    kept = np.minimum(tokens, limit)
    return {
        "samples": round(weight.sum()),
        "texts": round((count * weight).sum()),
        "bytes": round((total * weight).sum()),
        "exact": exact,
        "length": {name: round(mean[row]) for name, row in quantiles(mean, weight).items()},
        "tokens": round((kept * weight).sum()),
        "tokens_by": "the trained tokenizer" if known else "bytes / 4",
        "max_tokens": limit,
        "cropped_samples": round(weight[tokens > limit].sum()),
        "cropped_tokens": round(((tokens - kept) * weight).sum()),
    }


def _count_images(tokenizer, members: np.ndarray) -> dict:
    settings, sized = tokenizer.config, members[members["b"] > 0]
    pixels = sized["a"].astype(np.int64) * sized["b"]
    large = pixels > settings.max_tokens * settings.patch**2
    lost = pixels - _count_tokens(tokenizer, sized) * settings.patch**2
    return _count(tokenizer, members) | {
        "unknown": len(members) - len(sized),
        "pixels": int(pixels.sum()),
        "resolution": {n: [int(sized["a"][row]), int(sized["b"][row])] for n, row in quantiles(pixels).items()},
        "max_tokens": settings.max_tokens,
        "scaled_samples": int(large.sum()),
        "lost_pixels": int(lost[large].sum()),
    }


def _count_audio(tokenizer, members: np.ndarray) -> dict:
    settings, timed = tokenizer.config, members[members["b"] > 0]
    seconds, window = timed["a"] / 1000, settings.window_samples / settings.sample_rate
    rates, counts = np.unique(timed["b"], return_counts=True)
    return _count(tokenizer, members) | {
        "unknown": len(members) - len(timed),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "seconds": {name: round(float(seconds[row]), 3) for name, row in quantiles(seconds).items()},
        "rates": {str(rate): int(count) for rate, count in zip(rates, counts)},
        "max_tokens": settings.max_tokens,
        "window": round(window, 3),
        "cropped_samples": int((seconds > window).sum()),
        "cropped_seconds": round(float(np.maximum(seconds - window, 0).sum()), 1),
    }
