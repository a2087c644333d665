"""What the indexes tell of a corpus. Nothing is decoded but text inside JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..corpus import index
from ..corpus.index import Index
from ..corpus.shards import Config as Source
from ..errors import SampleError
from ..tokenizers import audio, image, text
from .verify import whose

SAMPLE = 10_000  # samples that are read to tell how much text a corpus has, where the index does not say


@dataclass
class Survey:
    """What a corpus holds: plain data for programs, and values (N,) with weights (N,) for figures."""

    data: dict
    spreads: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class _Texts:
    """A row for each sample with text, or for each of a sample of them, that stands for `weight` samples."""

    total: np.ndarray  # bytes
    mean: np.ndarray  # bytes of one of its texts
    count: np.ndarray  # of its texts
    weight: np.ndarray


def survey(indexes: list[Index], tokenizers: dict, config: str = "") -> Survey:
    """What the shards hold, counted from their indexes; text inside JSON is read, of many samples an even sample."""
    modalities = list(tokenizers)
    words = next((modality for modality, plugin in tokenizers.items() if isinstance(plugin, text.Tokenizer)), None)
    makeup: Counter = Counter()
    unsure: dict[tuple[str, ...], list[tuple[Index, np.ndarray]]] = {}
    rows: dict[str, list[np.ndarray]] = {modality: [] for modality in modalities}
    for one in indexes:
        for modality in modalities:
            endings = _sure(tokenizers[modality].config) if modality == words else tokenizers[modality].extensions
            rows[modality].append(_members(one, endings))
        for which, (endings, count) in enumerate(zip(one.makeups, one.head["counts"], strict=True)):
            has = [k for k in modalities if k != words and not set(endings).isdisjoint(tokenizers[k].extensions)]
            if words and not set(endings).isdisjoint(_sure(tokenizers[words].config)):
                has.append(words)
            elif words and not set(endings).isdisjoint(tokenizers[words].extensions):
                unsure.setdefault(tuple(has), []).append((one, np.flatnonzero(one.makeup == which)))
                continue
            makeup[_ordered(has, modalities)] += count
    held = {modality: np.concatenate(found) if found else np.zeros(0, index.MEMBER) for modality, found in rows.items()}
    data = {
        "shards": len(indexes),
        "samples": sum(map(len, indexes)),
        "bytes": sum(one.head["size"] for one in indexes),
        "config": config or "defaults",
    }
    spreads: dict[str, tuple] = {}
    found: dict[str, dict] = {}
    if words:
        plugin = tokenizers[words]
        texts, exact = _texts(plugin, held[words], unsure, words, modalities, makeup)
        rate = _rate(plugin, indexes)
        found[words] = _of_text(plugin.config, texts, exact, rate)
        spreads["text"] = texts.mean, texts.weight
    for modality in modalities:
        plugin, own = tokenizers[modality], held[modality]
        if isinstance(plugin, image.Tokenizer):
            found[modality] = _of_image(plugin, own)
            sized = own[own["b"] > 0]
            wide, high = sized["a"].astype(float), sized["b"].astype(float)
            spreads["resolution"] = np.sqrt(wide * high), np.ones(len(sized))
            spreads["aspect"] = wide / np.maximum(high, 1), np.ones(len(sized))
        elif isinstance(plugin, audio.Tokenizer):
            found[modality] = _of_audio(plugin, own)
            spreads["duration"] = own["a"][own["b"] > 0] / 1000, np.ones(int((own["b"] > 0).sum()))
        elif modality != words:
            found[modality] = {"samples": len(own), "bytes": int(own["length"].sum(dtype=np.int64))}
            if (tokens := _count(plugin, own)) is not None:
                found[modality]["tokens"] = int(tokens.sum())
    data["makeup"] = {" + ".join(has) or "nothing": round(n) for has, n in makeup.most_common() if round(n)}
    data["together"] = _together(makeup, modalities)
    data["modalities"] = {modality: found[modality] for modality in modalities if found[modality]["samples"]}
    data["tokens"] = sum(one.get("tokens", 0) for one in data["modalities"].values())
    data["refused"] = _refusals(indexes)
    return Survey(data, spreads)


def _sure(settings) -> tuple[str, ...]:
    """The members that are text whatever is in them; all else must be looked into."""
    return ("txt",) if isinstance(settings.fields, list) and settings.fields[0] == "txt" else ()


def _ordered(has, modalities: list[str]) -> tuple[str, ...]:
    return tuple(modality for modality in modalities if modality in has)


def _members(one: Index, endings: tuple[str, ...]) -> np.ndarray:
    """The row of `members` that a tokenizer reads of each sample which has one: of several the first ending's."""
    sample_of = np.repeat(np.arange(len(one)), np.diff(one.first))
    chosen = np.full(len(one), -1)
    for ending in reversed([e for e in endings if e in one.endings]):
        own = np.flatnonzero(one.members["ending"] == one.endings.index(ending))
        chosen[sample_of[own]] = own
    return np.array(one.members[chosen[chosen >= 0]])


def _together(makeup: Counter, modalities: list[str]) -> dict[str, int]:
    """How many samples have at least two given modalities, or three, where there are any."""
    found = {}
    for size in range(2, len(modalities) + 1):
        for some in combinations(modalities, size):
            count = round(sum(n for has, n in makeup.items() if set(some) <= set(has)))
            if count:
                found[" + ".join(some)] = count
    return found


def _texts(plugin, sure: np.ndarray, unsure: dict, words: str, modalities: list[str], makeup: Counter):
    """The samples' texts, and whether they are all counted; what the unsure samples turn out to be goes to `makeup`."""
    exact, read = True, []
    for has, held in unsure.items():
        total, picks = sum(len(samples) for _, samples in held), evenly(held, SAMPLE)
        exact, weight = exact and len(picks) == total, total / len(picks)
        for one, sample in picks:
            lengths = [len(t.encode("utf-8", "surrogatepass")) for t in _things(plugin, one, sample)]
            makeup[_ordered((*has, words) if lengths else has, modalities)] += weight
            if lengths:
                read.append((sum(lengths), sum(lengths) / len(lengths), len(lengths), weight))
    own, ones = sure["length"].astype(float), np.ones(len(sure))
    columns = zip((own, own, ones, ones), np.array(read, float).reshape(-1, 4).T)
    return _Texts(*map(np.concatenate, columns)), exact


def _things(plugin, one: Index, sample: int) -> list[str]:
    """A sample's texts; none where they cannot be read."""
    try:
        return plugin.split_inputs(one.read(sample, plugin.extensions, Source.bytes)[0])
    except SampleError:
        return []


def _rate(plugin, indexes: list[Index]) -> float | None:
    """Tokens a byte of text, measured on 1,000 samples; None where there is no trained tokenizer."""
    if not plugin.config.file:
        return None
    tokens, length = 0, 0
    for one, sample in evenly([(one, np.arange(len(one))) for one in indexes], 1000):
        for found in _things(plugin, one, sample)[:4]:
            start = found[:20_000]
            tokens += len(text.Tokenizer(plugin.config).encode(start))
            length += len(start.encode("utf-8", "surrogatepass"))
    return tokens / length if length else None


def evenly(held: list[tuple[Index, np.ndarray]], most: int) -> list[tuple[Index, int]]:
    """At most so many of the samples that are held, (index, numbers of its samples) each."""
    bounds = np.cumsum([0, *(len(samples) for _, samples in held)])
    total = int(bounds[-1])
    picks = np.unique(np.linspace(0, total - 1, min(total, most)).astype(int)) if total else np.zeros(0, int)
    shards = np.searchsorted(bounds, picks, "right") - 1
    return [(held[shard][0], int(held[shard][1][pick - bounds[shard]])) for shard, pick in zip(shards, picks)]


QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


def quantiles(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, int]:
    """Which of the values (N,) stand at the quantiles; empty where there are none."""
    if not len(values):
        return {}
    order = np.argsort(values, kind="stable")
    heap = np.cumsum(np.ones(len(values)) if weights is None else weights[order])
    places = {name: np.searchsorted(heap, share * heap[-1] * (1 - 1e-12)) for name, share in QUANTILES.items()}
    return {name: int(order[min(place, len(order) - 1)]) for name, place in places.items()}


def _of_text(settings, texts: _Texts, exact: bool, rate: float | None) -> dict:
    tokens = texts.mean * (rate if rate is not None else 0.25) + 2
    kept = np.minimum(tokens, settings.max_tokens)
    at = quantiles(texts.mean, texts.weight)
    return {
        "samples": round(texts.weight.sum()),
        "texts": round((texts.count * texts.weight).sum()),
        "bytes": round((texts.total * texts.weight).sum()),
        "exact": exact,
        "length": {name: round(texts.mean[place]) for name, place in at.items()},
        "tokens": round((kept * texts.weight).sum()),
        "tokens_by": "bytes / 4" if rate is None else "the trained tokenizer",
        "max_tokens": settings.max_tokens,
        "cropped_samples": round(texts.weight[tokens > settings.max_tokens].sum()),
        "cropped_tokens": round(((tokens - kept) * texts.weight).sum()),
    }


def _count(tokenizer, own: np.ndarray) -> np.ndarray | None:
    """Tokens (N,) of a training view of each member; None where the tokenizer cannot tell."""
    if not len(own):
        return np.zeros(0, np.int64)
    return tokenizer.count_tokens(own["length"], own["a"].astype(np.int64), own["b"].astype(np.int64))


def _of_image(tokenizer, own: np.ndarray) -> dict:
    settings = tokenizer.config
    sized = own[own["b"] > 0]
    pixels = sized["a"].astype(np.int64) * sized["b"]
    read = _count(tokenizer, sized) * settings.patch**2
    return {
        "samples": len(own),
        "bytes": int(own["length"].sum(dtype=np.int64)),
        "unknown": len(own) - len(sized),
        "pixels": int(pixels.sum()),
        "resolution": {name: [int(sized["a"][p]), int(sized["b"][p])] for name, p in quantiles(pixels).items()},
        "tokens": int(_count(tokenizer, own).sum()),
        "max_tokens": settings.max_tokens,
        "scaled_samples": int((pixels > read).sum()),
        "lost_pixels": int(np.maximum(pixels - read, 0).sum()),
    }


def _of_audio(tokenizer, own: np.ndarray) -> dict:
    settings = tokenizer.config
    timed = own[own["b"] > 0]
    seconds, window = timed["a"] / 1000, settings.window_samples / settings.sample_rate
    rates, counts = np.unique(timed["b"], return_counts=True)
    return {
        "samples": len(own),
        "bytes": int(own["length"].sum(dtype=np.int64)),
        "unknown": len(own) - len(timed),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "seconds": {name: round(float(seconds[place]), 3) for name, place in quantiles(seconds).items()},
        "rates": {str(rate): int(count) for rate, count in zip(rates, counts)},
        "tokens": int(_count(tokenizer, own).sum()),
        "max_tokens": settings.max_tokens,
        "window": round(window, 3),
        "cropped_samples": int((seconds > window).sum()),
        "cropped_seconds": round(float(np.maximum(seconds - window, 0).sum()), 1),
    }


def _refusals(indexes: list[Index]) -> dict:
    reasons: Counter = Counter()
    first, count = [], 0
    for one in indexes:
        count += one.head["refused_count"]
        for row in one.refused:
            reasons[row.reason] += 1
            if len(first) < 100:
                key = whose(one, row)
                first.append(
                    {"shard": row.shard, "key": key, "part": row.part, "reason": row.reason, "detail": row.detail}
                )
    return {"count": count, "reasons": dict(reasons.most_common()), "first": first}
