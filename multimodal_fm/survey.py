"""What a corpus holds, told from its indexes; whether it is still what was indexed; what a training run would get.

`survey` decodes nothing. `verify` reads every byte, `samples` decodes every part.
"""

from __future__ import annotations

import io
import json as json_
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from . import index, storage
from .errors import REASONS, BadInput, Lost
from .index import Index, Refused
from .shards import Config as Source
from .shards import find
from .tokenizers import audio, image, text

SAMPLE = 10_000  # items that are read to tell how much text a corpus has, where the index does not say
NAMED = 10_000  # damaged parts that are named; all are counted
SHOWN = 10_000  # characters of a text that `samples` gives
SAID = 5  # refused things that the lines name


def inspect(
    patterns: list[str],
    config: str = "",
    html: str = "",
    verify: bool = False,
    rebuild: bool = False,
    json: bool = False,
    samples: bool = False,
    piece: int = index.PIECE,
) -> int:
    """What `mmfm inspect` does; its exit code: 1 where `verify` finds damage. Raises BadInput."""
    if not patterns:
        raise BadInput("name at least one shard: a .tar, .jsonl or .txt file, a pattern or a URL")
    if verify and rebuild:
        raise BadInput("--verify compares with the index that --rebuild would replace: give one of them")
    if piece < 16:
        raise BadInput("--piece is at least 16 bytes")
    if html and samples:
        raise BadInput("--samples writes no page: leave out --html")
    tokenizers = plugins(config)
    files = list(dict.fromkeys(find(patterns)))
    damage = Damage() if verify else None
    indexes = open_all(files, piece, rebuild, damage)
    if samples:
        for row in every_sample(indexes, tokenizers):
            print(json_.dumps(row))
        for one in damage.rows if damage else []:
            print(_said(one), file=sys.stderr)
    else:
        found = survey(indexes, tokenizers, config)
        if damage is not None:
            found.data["damage"] = {"count": damage.count, "new_shards": damage.new, "first": damage.rows}
        print(json_.dumps(found.data) if json else "\n".join(lines(found.data)))
        if html:
            write(html, patterns, indexes, tokenizers, found)
            print(html, file=sys.stderr if json else sys.stdout)
    return 1 if damage is not None and damage.count else 0


def plugins(config: str = "") -> dict:
    """The tokenizers of a configuration, by kind; without one text, image and audio as they come. Raises BadInput."""
    from .config import Plugin, load

    if config:
        found = load(config).tokenizers
        for plugin in found.values():
            if getattr(plugin.settings, "file", "") and hasattr(plugin.module, "check"):
                plugin.module.check(plugin.settings)
        return found
    return {kind: Plugin(kind, module, module.Config()) for kind, module in _OWN.items()}


_OWN = {"text": text, "image": image, "audio": audio}

# Opening, and whether the shards are what was indexed


@dataclass
class Damage:
    """What is not as it was indexed, or was damaged already then."""

    rows: list[dict] = field(default_factory=list)  # shard, key, part, reason, detail; at most NAMED
    count: int = 0
    new: int = 0  # shards that had no index to be compared with

    def add(self, shard: str, key: str, part: str, reason: str, detail: str) -> None:
        self.count += 1
        if len(self.rows) < NAMED:
            self.rows.append({"shard": shard, "key": key, "part": part, "reason": reason, "detail": detail})


def open_all(files: list[str], piece: int, rebuild: bool = False, damage: Damage | None = None) -> list[Index]:
    """The shards' indexes, built where there is none; with `damage` all that is damaged goes there.

    A shard whose index cannot be believed is then left out. Raises BadInput where a shard is another one than its index
    says, or an index is damaged, and there is no `damage` to take it.
    """
    told = _Told()
    if damage is not None:
        return [one for file in files if (one := verify(file, piece, damage, told)) is not None]
    if rebuild:
        for file in files:
            told(file)
            index.build(file, piece)
    indexes = index.open_all(files, piece, told)
    for one in indexes:
        if not one.whole():
            raise BadInput(f"{one.shard}: {one.file} is damaged; `mmfm inspect --rebuild {one.shard}` makes it anew")
    return indexes


def verify(shard: str, piece: int, damage: Damage, told=lambda shard: None) -> Index | None:
    """Read every byte of the shard and compare it with its index, which is returned unless it is damaged itself.

    A shard that has no index yet gets one, and has nothing but its own headers to be compared with. Raises BadInput.
    """
    told(shard)
    try:
        one = index.known(shard, piece)
    except index.Damaged as error:
        damage.add(shard, "", "index", "crc", f"{error}; `mmfm inspect --rebuild {shard}` makes it anew")
        return None
    if one is None:
        damage.new += 1
        one = index.build(shard, piece)
    else:
        try:
            _compare(one, damage)
        except (OSError, Lost) as error:
            damage.add(shard, "", "", "read", str(error))
        if not one.whole():
            return None
    for refused in one.refused:
        if refused.reason == "shard":
            damage.add(shard, whose(one, refused), refused.part, "shard", refused.detail)
    return one


def _compare(one: Index, damage: Damage) -> None:
    """Adds what in a shard is not as it was indexed. Raises OSError, Lost."""
    storage.forget(one.shard)
    size, before = storage.size(one.shard), damage.count
    same = size == one.head["size"] and index.digest_of(one.shard, size) == one.head["sha256"]
    if not one.whole():
        mend = f"`mmfm inspect --rebuild {one.shard}` makes it anew"
        damage.add(one.shard, "", "index", "crc", f"{one.file}: its tables are not what was written; {mend}")
        if not same:
            damage.add(one.shard, "", "", "crc", "the shard is not what was indexed either, where cannot be told")
        return
    if same:
        return
    for item, ending, reason, detail in one.differences():
        damage.add(one.shard, one.key(item) if item >= 0 else "", ending, reason, detail)
    if size != one.head["size"]:
        damage.add(one.shard, "", "", "shard", f"{size} bytes, it was indexed with {one.head['size']}")
    elif damage.count == before:
        damage.add(one.shard, "", "", "crc", "not what was indexed, in which item cannot be told")


class _Told:
    """Says, from two seconds on, which shard is being read."""

    def __init__(self):
        self.began = time.monotonic()

    def __call__(self, shard: str) -> None:
        if time.monotonic() - self.began > 2:
            print(f"reading {shard}", file=sys.stderr)


def whose(one: Index, refused: Refused) -> str:
    """The key of the item that a refused thing belongs to; empty where nobody knows.

    A damaged header belongs to the item on both sides of it, or to the neighbour whose name it nearly has.
    """
    place = re.search(r"at byte (\d+)$", refused.detail)
    if refused.key or refused.reason != "shard" or not place or not len(one):
        return refused.key
    offset = int(place[1])
    after = int(np.searchsorted(one.members["offset"], offset))
    beside = [row for row in (after - 1, after) if 0 <= row < len(one.members)]
    keys = [one.key(int(np.searchsorted(one.first, row, "right")) - 1) for row in beside]
    if len(keys) == 2 and keys[0] == keys[1]:
        return keys[0]
    try:
        block = storage.read(one.shard, offset, 100)
    except (OSError, Lost):
        return ""
    near = sorted((_bits(block, f"{key}.".encode()[:100]), key) for key in keys)
    return near[0][1] if near[0][0] <= 2 and (len(near) == 1 or near[0][0] < near[1][0]) else ""


def _bits(block: bytes, name: bytes) -> int:
    """How many bits of the name stand otherwise at the beginning of the block."""
    if len(block) < len(name):
        return 8 * len(name)
    return sum((x ^ y).bit_count() for x, y in zip(block, name))


# What a training run would get


def every_sample(indexes: list[Index], tokenizers: dict) -> Iterator[dict]:
    """A row an item, its parts really read, and one for each refused thing of which nothing is left."""
    for one in indexes:
        refused: dict[str, dict[str, str]] = {}
        nameless = []
        for row in one.refused:
            key = whose(one, row)
            if key:
                refused.setdefault(key, {})[row.part or "item"] = row.reason
            else:
                nameless.append(row.reason)
        for item in range(len(one)):
            yield sample(one, item, tokenizers, refused.pop(one.key(item), {}))
        for key, lost in [*refused.items(), *(("", {"shard": reason}) for reason in nameless)]:
            yield {"shard": one.shard, "key": key, "outcome": "skip", "lost": lost}
        if (more := one.head["refused_count"] - len(one.refused)) > 0:
            print(f"{one.shard}: {more} more were refused, which the index does not name", file=sys.stderr)


def sample(one: Index, item: int, tokenizers: dict, lost: dict[str, str]) -> dict:
    """What comes of an item, of which `lost` is known to be refused: its outcome and a description of each part."""
    parts, lost = {}, dict(lost)
    for kind, plugin in tokenizers.items():
        found, reason = described(one, item, plugin)
        if found is not None:
            parts[kind] = found[:SHOWN] if isinstance(found, str) else found
        if reason is not None:
            lost[kind] = reason.reason
    if not parts and not lost:
        lost["item"] = "empty"
    outcome = "skip" if not parts else "partial" if lost else "ok"
    return {"shard": one.shard, "key": one.key(item), "outcome": outcome, "lost": lost, **parts}


def described(one: Index, item: int, plugin) -> tuple[object, Lost | None]:
    """What an item has of one kind, None where it has none that can be read, and what is lost of it."""
    if set(one.makeups[one.makeup[item]]).isdisjoint(plugin.module.extensions):
        return None, None
    members, failed = one.read(item, plugin.module.extensions, Source.bytes)
    reason = failed[0][1] if failed else None
    if not members:
        return None, reason
    try:
        if hasattr(plugin.module, "describe"):
            return plugin.module.describe(plugin.settings, members), reason
        views = plugin.module.read(plugin.settings, members)
        return {"tokens": sum(map(len, views))} if views else None, reason
    except Lost as error:
        return None, error


# What the indexes tell


@dataclass
class Survey:
    """What a corpus holds: plain data for programs, and values (N,) with weights (N,) for figures."""

    data: dict
    spreads: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class _Texts:
    """A row for each item with text, or for each of a sample of them, that stands for `weight` items."""

    total: np.ndarray  # bytes
    mean: np.ndarray  # bytes of one of its texts
    count: np.ndarray  # of its texts
    weight: np.ndarray


def survey(indexes: list[Index], tokenizers: dict, config: str = "") -> Survey:
    """What the shards hold, counted from their indexes; text inside JSON is read, of many items an even sample."""
    kinds = list(tokenizers)
    words = next((kind for kind, plugin in tokenizers.items() if plugin.module is text), None)
    makeup: Counter = Counter()
    unsure: dict[tuple[str, ...], list[tuple[Index, np.ndarray]]] = {}
    rows: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for one in indexes:
        for kind in kinds:
            endings = _sure(tokenizers[kind].settings) if kind == words else tokenizers[kind].module.extensions
            rows[kind].append(_members(one, endings))
        for which, (endings, count) in enumerate(zip(one.makeups, one.head["counts"], strict=True)):
            has = [k for k in kinds if k != words and not set(endings).isdisjoint(tokenizers[k].module.extensions)]
            if words and not set(endings).isdisjoint(_sure(tokenizers[words].settings)):
                has.append(words)
            elif words and not set(endings).isdisjoint(tokenizers[words].module.extensions):
                unsure.setdefault(tuple(has), []).append((one, np.flatnonzero(one.makeup == which)))
                continue
            makeup[_ordered(has, kinds)] += count
    held = {kind: np.concatenate(found) if found else np.zeros(0, index.MEMBER) for kind, found in rows.items()}
    data = {
        "shards": len(indexes),
        "items": sum(map(len, indexes)),
        "bytes": sum(one.head["size"] for one in indexes),
        "config": config or "defaults",
    }
    spreads: dict[str, tuple] = {}
    found: dict[str, dict] = {}
    if words:
        plugin = tokenizers[words]
        texts, exact = _texts(plugin, held[words], unsure, words, kinds, makeup)
        rate = _rate(plugin, indexes)
        found[words] = _of_text(plugin.settings, texts, exact, rate)
        spreads["text"] = texts.mean, texts.weight
    for kind in kinds:
        plugin, own = tokenizers[kind], held[kind]
        if plugin.module is image:
            found[kind] = _of_image(plugin.settings, own)
            sized = own[own["b"] > 0]
            wide, high = sized["a"].astype(float), sized["b"].astype(float)
            spreads["resolution"] = np.sqrt(wide * high), np.ones(len(sized))
            spreads["aspect"] = wide / np.maximum(high, 1), np.ones(len(sized))
        elif plugin.module is audio:
            found[kind] = _of_audio(plugin.settings, own)
            spreads["duration"] = own["a"][own["b"] > 0] / 1000, np.ones(int((own["b"] > 0).sum()))
        elif kind != words:
            found[kind] = {"items": len(own), "bytes": int(own["length"].sum(dtype=np.int64))}
            if hasattr(plugin.module, "count"):
                found[kind]["tokens"] = int(_count(plugin.module, plugin.settings, own).sum())
    data["makeup"] = {" + ".join(has) or "nothing": round(n) for has, n in makeup.most_common() if round(n)}
    data["together"] = _together(makeup, kinds)
    data["kinds"] = {kind: found[kind] for kind in kinds if found[kind]["items"]}
    data["tokens"] = sum(one.get("tokens", 0) for one in data["kinds"].values())
    data["refused"] = _refusals(indexes)
    return Survey(data, spreads)


def _sure(settings) -> tuple[str, ...]:
    """The members that are text whatever is in them; all else must be looked into."""
    return ("txt",) if isinstance(settings.fields, list) and settings.fields[0] == "txt" else ()


def _ordered(has, kinds: list[str]) -> tuple[str, ...]:
    return tuple(kind for kind in kinds if kind in has)


def _members(one: Index, endings: tuple[str, ...]) -> np.ndarray:
    """The row of `members` that a tokenizer reads of each item which has one: of several the first ending's."""
    item_of = np.repeat(np.arange(len(one)), np.diff(one.first))
    chosen = np.full(len(one), -1)
    for ending in reversed([e for e in endings if e in one.endings]):
        own = np.flatnonzero(one.members["ending"] == one.endings.index(ending))
        chosen[item_of[own]] = own
    return np.array(one.members[chosen[chosen >= 0]])


def _together(makeup: Counter, kinds: list[str]) -> dict[str, int]:
    """How many items have at least two given kinds, or three, where there are any."""
    found = {}
    for size in range(2, len(kinds) + 1):
        for some in combinations(kinds, size):
            count = round(sum(n for has, n in makeup.items() if set(some) <= set(has)))
            if count:
                found[" + ".join(some)] = count
    return found


def _texts(plugin, sure: np.ndarray, unsure: dict, words: str, kinds: list[str], makeup: Counter):
    """The items' texts, and whether they are all counted; what the unsure items turn out to be goes to `makeup`."""
    exact, read = True, []
    for has, held in unsure.items():
        total, picks = sum(len(items) for _, items in held), _evenly(held, SAMPLE)
        exact, weight = exact and len(picks) == total, total / len(picks)
        for one, item in picks:
            lengths = [len(t.encode("utf-8", "surrogatepass")) for t in _things(plugin, one, item)]
            makeup[_ordered((*has, words) if lengths else has, kinds)] += weight
            if lengths:
                read.append((sum(lengths), sum(lengths) / len(lengths), len(lengths), weight))
    own, ones = sure["length"].astype(float), np.ones(len(sure))
    columns = zip((own, own, ones, ones), np.array(read, float).reshape(-1, 4).T)
    return _Texts(*map(np.concatenate, columns)), exact


def _things(plugin, one: Index, item: int) -> list[str]:
    """An item's texts; none where they cannot be read."""
    try:
        return plugin.module.things(plugin.settings, one.read(item, plugin.module.extensions, Source.bytes)[0])
    except Lost:
        return []


def _rate(plugin, indexes: list[Index]) -> float | None:
    """Tokens a byte of text, measured on 1,000 items; None where there is no trained tokenizer."""
    if not plugin.settings.file:
        return None
    tokens, length = 0, 0
    for one, item in _evenly([(one, np.arange(len(one))) for one in indexes], 1000):
        for found in _things(plugin, one, item)[:4]:
            start = found[:20_000]
            tokens += len(text.encode(plugin.settings, start))
            length += len(start.encode("utf-8", "surrogatepass"))
    return tokens / length if length else None


def _evenly(held: list[tuple[Index, np.ndarray]], most: int) -> list[tuple[Index, int]]:
    """At most so many of the items that are held, (index, numbers of its items) each."""
    bounds = np.cumsum([0, *(len(items) for _, items in held)])
    total = int(bounds[-1])
    picks = np.unique(np.linspace(0, total - 1, min(total, most)).astype(int)) if total else np.zeros(0, int)
    shards = np.searchsorted(bounds, picks, "right") - 1
    return [(held[shard][0], int(held[shard][1][pick - bounds[shard]])) for shard, pick in zip(shards, picks)]


QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


def _quantiles(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, int]:
    """Which of the values (N,) stand at the quantiles; empty where there are none."""
    if not len(values):
        return {}
    order = np.argsort(values, kind="stable")
    heap = np.cumsum(np.ones(len(values)) if weights is None else weights[order])
    places = {name: np.searchsorted(heap, share * heap[-1] * (1 - 1e-12)) for name, share in QUANTILES.items()}
    return {name: int(order[min(place, len(order) - 1)]) for name, place in places.items()}


def _of_text(settings, texts: _Texts, exact: bool, rate: float | None) -> dict:
    tokens = texts.mean * (rate if rate is not None else 0.25) + 2
    kept = np.minimum(tokens, settings.limit)
    at = _quantiles(texts.mean, texts.weight)
    return {
        "items": round(texts.weight.sum()),
        "texts": round((texts.count * texts.weight).sum()),
        "bytes": round((texts.total * texts.weight).sum()),
        "exact": exact,
        "length": {name: round(texts.mean[place]) for name, place in at.items()},
        "tokens": round((kept * texts.weight).sum()),
        "tokens_by": "bytes / 4" if rate is None else "the trained tokenizer",
        "limit": settings.limit,
        "cropped_items": round(texts.weight[tokens > settings.limit].sum()),
        "cropped_tokens": round(((tokens - kept) * texts.weight).sum()),
    }


def _count(module, settings, own: np.ndarray) -> np.ndarray:
    """Tokens (N,) of a training view of each member."""
    if not len(own):
        return np.zeros(0, np.int64)
    return module.count(settings, own["length"], own["a"].astype(np.int64), own["b"].astype(np.int64))


def _of_image(settings, own: np.ndarray) -> dict:
    sized = own[own["b"] > 0]
    pixels = sized["a"].astype(np.int64) * sized["b"]
    read = _count(image, settings, sized) * settings.patch**2
    return {
        "items": len(own),
        "bytes": int(own["length"].sum(dtype=np.int64)),
        "unknown": len(own) - len(sized),
        "pixels": int(pixels.sum()),
        "resolution": {name: [int(sized["a"][p]), int(sized["b"][p])] for name, p in _quantiles(pixels).items()},
        "tokens": int(_count(image, settings, own).sum()),
        "limit": settings.limit,
        "scaled_items": int((pixels > read).sum()),
        "lost_pixels": int(np.maximum(pixels - read, 0).sum()),
    }


def _of_audio(settings, own: np.ndarray) -> dict:
    timed = own[own["b"] > 0]
    seconds, window = timed["a"] / 1000, settings.samples / settings.rate
    rates, counts = np.unique(timed["b"], return_counts=True)
    return {
        "items": len(own),
        "bytes": int(own["length"].sum(dtype=np.int64)),
        "unknown": len(own) - len(timed),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "seconds": {name: round(float(seconds[place]), 3) for name, place in _quantiles(seconds).items()},
        "rates": {str(rate): int(count) for rate, count in zip(rates, counts)},
        "tokens": int(_count(audio, settings, own).sum()),
        "limit": settings.limit,
        "window": round(window, 3),
        "cropped_items": int((seconds > window).sum()),
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


# For a person


def lines(data: dict) -> list[str]:
    """What `survey` found, and the damage if it was looked for, in a few lines."""
    kinds, label = data["kinds"], "{:10} ".format
    said = [f"{_many(data['shards'], 'shard')}, {_many(data['items'], 'item')}, {_bytes(data['bytes'])}"]
    said += [label("holds" * (not n)) + f"{count:,} {has}" for n, (has, count) in enumerate(data["makeup"].items())]
    together = {has: count for has, count in data["together"].items() if data["makeup"].get(has) != count}
    if together:
        said.append(label("together") + ", ".join(f"{count:,} {has}" for has, count in together.items()))
    said += [label(kind) + "; ".join(facts(kind, found)) for kind, found in kinds.items()]
    if kinds:
        parts = ", ".join(f"{kind} {one['tokens']:,}" for kind, one in kinds.items() if "tokens" in one)
        said.append(label("tokens") + f"{data['tokens']:,} a pass under {settings_of(data)}: {parts}")
        said += [label("lost" * (not n)) + one for n, one in enumerate(losses(kinds))]
    refused = data["refused"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused["reasons"].items())
    said.append(label("refused") + (f"{refused['count']:,}: {reasons}" if refused["count"] else "nothing"))
    said += _first(refused)
    if "damage" in data:
        said.append(label("damage") + damage_found(data["damage"]))
        said += _first(data["damage"], 20)
    return said


def damage_found(damage: dict) -> str:
    new = f"; {_many(damage['new_shards'], 'shard')} indexed only now, with nothing to compare with"
    found = _many(damage["count"], "part") if damage["count"] else "none, every byte was read"
    return found + (new if damage["new_shards"] else "")


def _first(found: dict, most: int = SAID) -> list[str]:
    said = [f"  {_said(row)}" for row in found["first"][:most]]
    more = found["count"] - len(said)
    return said + ([f"  and {more:,} more, see --json"] if more else [])


def _said(row: dict) -> str:
    name = " ".join(filter(None, (row["shard"], row["key"], row["part"])))
    return f"{name}: {row['reason']} ({row['detail']})"


def settings_of(data: dict) -> str:
    return "the default settings" if data["config"] == "defaults" else data["config"]


def facts(kind: str, found: dict) -> list[str]:
    """What is said of one kind."""
    about = "" if found.get("exact", True) else "about "
    said = [f"{about}{_many(found['items'], 'item')}"]
    if "texts" in found:
        said[0] += f", {_many(found['texts'], 'text')}"
    said[0] += f", {_bytes(found['bytes'])}"
    if found.get("length"):
        said.append(f"a text has {_range(found['length'], '{:,}'.format)} bytes")
    if found.get("resolution"):
        said[0] += f", {found['pixels'] / 1e6:,.1f} megapixels"
        said.append(_range(found["resolution"], "{0[0]} x {0[1]}".format) + " pixels")
    if "hours" in found:
        said[0] += f", {_clock(found['hours'] * 3600)}"
    if found.get("seconds"):
        said.append(_range(found["seconds"], "{:.3g}".format) + " s")
        rates = sorted(found["rates"].items(), key=lambda one: -one[1])
        said.append(", ".join(f"{int(rate):,} Hz {count:,}" for rate, count in rates[:4]) + ", …" * (len(rates) > 4))
    if found.get("unknown"):
        said.append(f"{found['unknown']:,} whose header cannot be read")
    return said


def _range(found: dict, show) -> str:
    """Least, median and most."""
    return " – ".join(dict.fromkeys(show(found[name]) for name in ("min", "median", "max")))


def losses(kinds: dict) -> list[str]:
    """What a training run leaves out of each kind, and how text was counted."""
    said = []
    for found in kinds.values():
        if "tokens_by" in found:
            by = f"counted as {found['tokens_by']}" if "/" in found["tokens_by"] else f"by {found['tokens_by']}"
            share = found["cropped_tokens"] / max(found["cropped_tokens"] + found["tokens"], 1)
            said.append(
                f"text beyond {found['limit']} tokens: {found['cropped_tokens']:,} tokens ({_share(share)}) "
                f"of {_many(found['cropped_items'], 'item')}; {by}"
            )
        if "cropped_seconds" in found:
            whole = max(found["hours"] * 3600, 1e-9)
            said.append(
                f"sound beyond {found['window']:g} s: {_clock(found['cropped_seconds'])} "
                f"({_share(found['cropped_seconds'] / whole)}) of {_many(found['cropped_items'], 'item')}"
            )
        if "lost_pixels" in found:
            share = found["lost_pixels"] / max(found["pixels"], 1)
            said.append(
                f"pictures made smaller, to {found['limit']} patches: {found['lost_pixels'] / 1e6:,.1f} megapixels "
                f"({_share(share)}) of {_many(found['scaled_items'], 'item')}"
            )
    return said


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bytes(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(np.log10(count) / 3), 4)
    return f"{count / 1000**power:,.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


# The page

SHOW = 24  # items in the gallery
PICTURE, SOUND = 30_000, 60_000  # bytes, of what is put into the page as it is


def write(path: str | Path, patterns: list[str], indexes: list[Index], tokenizers: dict, found: Survey) -> None:
    """Write the page. Raises BadInput where it cannot be written."""
    from . import page

    data = found.data
    text_ = page.template("survey.html").render(
        patterns=patterns,
        data=data,
        said=[f"{_many(data['shards'], 'shard')}", _many(data["items"], "item"), _bytes(data["bytes"])],
        settings=settings_of(data),
        facts={kind: facts(kind, one) for kind, one in data["kinds"].items()},
        losses=losses(data["kinds"]),
        damaged=damage_found(data["damage"]) if "damage" in data else "",
        figures=figures(found.spreads),
        gallery=gallery(indexes, tokenizers),
        reasons=REASONS,
    )
    try:
        Path(path).write_bytes(text_.encode("utf-8", "replace"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None


def gallery(indexes: list[Index], tokenizers: dict) -> list[dict]:
    """A couple of dozen items, of each makeup as many, evenly spread: their parts, with what the page shows of them."""
    from .page import Media

    groups: dict[tuple, list] = {}
    for one in indexes:
        for which, endings in enumerate(one.makeups):
            has = tuple(k for k, plugin in tokenizers.items() if not set(endings).isdisjoint(plugin.module.extensions))
            groups.setdefault(has, []).append((one, np.flatnonzero(one.makeup == which)))
    media, shown = Media(PICTURE, SOUND), []
    for one, item in [pick for held in groups.values() for pick in _evenly(held, max(SHOW // len(groups), 2))]:
        parts, lost = [], {}
        for kind, plugin in tokenizers.items():
            found, reason = described(one, item, plugin)
            if reason is not None:
                lost[kind] = reason.reason
            if found is not None:
                parts.append({"kind": kind, "found": found, "source": _source(media, one, item, plugin)})
        shown.append({"key": one.key(item), "shard": os.path.basename(one.shard), "parts": parts, "lost": lost})
    return shown


def _source(media, one: Index, item: int, plugin) -> str:
    """A picture or a sound as a data URI; empty for all else, and where it cannot be made."""
    if plugin.module not in (image, audio):
        return ""
    kind = "image" if plugin.module is image else "audio"
    members, _ = one.read(item, plugin.module.extensions, Source.bytes)
    try:
        return media.uri(kind, plugin.module.extensions, members)
    except (Lost, OSError, RuntimeError, ValueError):  # what a player would not take either
        return ""


def figures(spreads: dict[str, tuple]) -> list[dict]:
    """A histogram of each spread that has anything in it: a title and an SVG."""
    titles = {
        "text": ("length of a text", "bytes"),
        "resolution": ("resolution", "pixels a side, √(width × height)"),
        "aspect": ("aspect ratio", "width / height"),
        "duration": ("duration", "seconds"),
    }
    return [
        _histogram(number, *titles[name], *spreads[name])
        for number, name in enumerate(titles)
        if name in spreads and len(spreads[name][0])
    ]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _histogram(number: int, title: str, label: str, values: np.ndarray, weights: np.ndarray) -> dict:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    from .page import LINES, STYLE, inline

    values = np.maximum(values, 1e-3)
    low, high = float(values.min()), float(values.max())
    low, high = (low / 1.5, high * 1.5) if high < low * 1.5 else (low, high)
    bins = np.geomspace(low * 0.999, high * 1.001, 31)
    with matplotlib.rc_context(STYLE):
        figure = Figure((3.7, 2.1), layout="constrained")
        axes = figure.subplots()
        axes.hist(values, bins, weights=weights, color=LINES[0])
        axes.set_xscale("log")
        axes.set_xlim(bins[0], bins[-1])
        axes.set_xlabel(label)
        axes.set_ylabel("items")
        axes.spines[["top", "right"]].set_visible(False)
        subs = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    middle = values[_quantiles(values, weights)["median"]]
    said = f"{title}: from {values.min():.3g} to {values.max():.3g} {label}, median {middle:.3g}"
    return {"title": title, "said": f"median {middle:,.3g}", "svg": inline(out.getvalue(), f"figure{number}", said)}
