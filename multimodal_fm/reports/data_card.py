"""The data card: what was packed, counted on the way. `card.md` is for people, `croissant.json` for programs."""

from __future__ import annotations

import array
import math
from collections import Counter

import numpy as np

from ..corpus.fields import lookup
from ..pack import dedup
from ..pack.samples import AUDIO_FILES, IMAGE_FILES
from ..pack.settings import Settings

DISTINCT = 10_000  # values of a field that are counted apart
SHOWN = 12  # of them that the card shows
LISTED = 100  # sources that the card shows
FIELDS = {
    "language": ("language", "lang", "original_data.language", "original_data.lang"),
    "license": ("license", "licence", "original_data.license", "original_data.licence"),
    "source": ("source", "original_data.source"),
    "label": ("label",),
}
"""Where a sample's JSON has what the card counts."""


def about(row: dict, members: dict[str, bytes]) -> dict:
    """What of a sample's JSON the card counts: a value, or a list of them, a field."""
    made = {}
    for name, places in FIELDS.items():
        value = next((v for v in (lookup(row, place) for place in places) if isinstance(v, (str, int))), None)
        if value is not None and value != "":
            made[name] = str(value)[:100]
    if isinstance(row.get("captions"), dict):
        made["translations"] = sorted(str(k)[:40] for k in row["captions"])[:500]
    if "label" not in made and "cls" in members:
        made["label"] = members["cls"][:20].decode("utf-8", "replace").strip()
    return made


class Facts:
    """What the card says, counted sample by sample; `data()` is plain."""

    def __init__(self, settings: Settings, sources: list[str]):
        self.settings = settings
        self.splits: dict[str, Counter] = {}
        self.sources = {source: Counter() for source in sources}
        self.refused: Counter = Counter()
        self.fields = {name: Counter() for name in (*FIELDS, "translations")}
        self.beyond: Counter = Counter()
        self.said: Counter = Counter()
        self.endings: Counter = Counter()
        self.widths, self.heights, self.seconds = array.array("I"), array.array("I"), array.array("f")
        self.rates: Counter = Counter()
        self.labels, self.largest = [], 0

    def refuse(self, reason: str) -> None:
        self.refused[reason] += 1

    def lose(self, source: str) -> None:
        self.sources[source]["lost"] += 1

    def duplicate(self, source: str, reason: str) -> None:
        self.sources[source][reason] += 1

    def rule(self, labels: list[str], largest: int) -> None:
        self.labels, self.largest = labels, largest

    def add(self, name: str, source: str, row: dict) -> None:
        counts, facts = self.splits.setdefault(name, Counter()), row.get("facts", {})
        self.sources[source]["samples"] += 1
        counts["samples"] += 1
        counts["text"] += bool(row["texts"])
        counts["image"] += bool(row["image"])
        counts["audio"] += bool(row["audio"])
        counts["text bytes"] += row["bytes"]
        for ending, _, length in row["members"]:
            counts["bytes"] += length
            self.endings[ending] += 1
        for width, height, patches in facts.get("image", ()):
            self.widths.append(width)
            self.heights.append(height)
            counts["patches"] += patches
        for seconds, rate, _ in facts.get("audio", ()):
            self.seconds.append(seconds)
            self.rates[str(rate)] += 1
            counts["milliseconds"] += round(1000 * seconds)
        for name_, value in row["about"].items():
            for one in value if isinstance(value, list) else [value]:
                counter = self.fields[name_]
                self.said[name_] += not isinstance(value, list)
                if one in counter or len(counter) < DISTINCT:
                    counter[one] += 1
                else:
                    self.beyond[name_] += 1

    def data(self) -> dict:
        settings = self.settings
        return {
            "splits": {name: dict(counts) for name, counts in sorted(self.splits.items(), key=_by_split)},
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "refused": dict(sorted(self.refused.items())),
            "fields": {name: dict(counter.most_common(SHOWN)) for name, counter in self.fields.items()},
            "distinct": {name: len(counter) for name, counter in self.fields.items()},
            "beyond": dict(self.beyond),
            "said": dict(self.said),
            "endings": dict(sorted(self.endings.items())),
            "quantiles": {
                "picture width": _quantiles(self.widths),
                "picture height": _quantiles(self.heights),
                "sound seconds": _quantiles(self.seconds),
            },
            "rates": dict(self.rates.most_common(SHOWN)),
            "labels": self.labels,
            "largest": self.largest,
            "settings": {
                "split": settings.split,
                "group": settings.group,
                "dedup": settings.dedup,
                "longest_side": settings.longest_side,
                "rate": settings.rate,
                "piece_bytes": settings.piece_bytes,
            },
        }


def _by_split(named: tuple) -> int:
    return ("train", "validation", "test").index(named[0])


QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def _quantiles(values) -> list[float]:
    if not len(values):
        return []
    return [round(float(v), 2) for v in np.quantile(np.array(values, np.float64), QUANTILES, method="nearest")]


# -------------------------------------------------------------------------------------------------------------- card.md


def markdown(facts: dict, shards: list[dict]) -> str:
    """The card as a page."""
    splits = facts["splits"]
    total = Counter()
    for counts in splits.values():
        total.update(counts)
    lines = ["# Data card", "", _opening(total, shards), ""]
    lines += _table(
        ["split", "samples", "share", "with text", "with picture", "with sound", "shards", "bytes"],
        [_split_row(name, counts, total, shards) for name, counts in splits.items()],
    )
    lines += ["## Size in tokens, roughly", ""]
    lines += _table(
        ["split", "text (bytes)", "pictures (patches of 16 pixels)", "sound (hours)"],
        [
            [name, _n(c.get("text bytes", 0)), _n(c.get("patches", 0)), f"{c.get('milliseconds', 0) / 3.6e6:.2f}"]
            for name, c in splits.items()
        ],
    )
    lines += ["A byte-level vocabulary makes a token of 2 to 5 bytes, once its merges are trained.", ""]
    measures = {name: found for name, found in facts["quantiles"].items() if found}
    if measures:
        lines += ["## Pictures and sounds", ""]
        heads = ["", "least", "5 %", "25 %", "median", "75 %", "95 %", "most"]
        lines += _table(heads, [[name, *(f"{v:g}" for v in found)] for name, found in measures.items()])
    if facts["rates"]:
        lines += [
            "Samples a second: " + ", ".join(f"{r} ({_n(n)} sounds)" for r, n in facts["rates"].items()) + ".",
            "",
        ]
    lines += ["Members: " + ", ".join(f"{_n(n)} .{e}" for e, n in facts["endings"].items()) + ".", ""]
    lines += ["## Sources", ""]
    lines += _table(
        ["source", "samples kept", "copies", "near copies", "nothing readable"],
        [
            [f"`{name}`", *(_n(c.get(k, 0)) for k in ("samples", "copy", "near-copy", "lost"))]
            for name, c in list(facts["sources"].items())[:LISTED]
        ],
    )
    if (more := len(facts["sources"]) - LISTED) > 0:
        lines += [f"And {_n(more)} more.", ""]
    for name, title in (
        ("source", "Where samples say they come from"),
        ("license", "Licences"),
        ("language", "Languages"),
        ("translations", "Languages of captions"),
        ("label", "Labels, of all sources together"),
    ):
        lines += _values(facts, name, title, total["samples"])
    lines += ["## What was done", "", *_done(facts), ""]
    lines += ["## Left out", ""]
    if facts["refused"]:
        lines += _table(["reason", "count"], [[why, _n(count)] for why, count in facts["refused"].items()])
        lines += ["`quarantine.jsonl` names each: a sample, or a part of one whose other parts were kept.", ""]
    else:
        lines += ["Nothing.", ""]
    lines += ["## Known gaps", "", *_gaps(facts, total), ""]
    return "\n".join(lines)


def _opening(total: Counter, shards: list[dict]) -> str:
    size = sum(one["bytes"] for one in shards)
    what = [f"{_n(total[modality])} with {name}" for modality, name in _KINDS if total[modality]]
    many = "1 shard" if len(shards) == 1 else f"{_n(len(shards))} shards"
    return f"{_n(total['samples'])} samples ({', '.join(what)}) in {many}, {_bytes(size)}."


_KINDS = (("text", "text"), ("image", "a picture"), ("audio", "a sound"))


def _split_row(name: str, counts: dict, total: Counter, shards: list[dict]) -> list[str]:
    own = [one for one in shards if one["name"].startswith(f"{name}-")]
    parts = [_n(counts.get(modality, 0)) for modality, _ in _KINDS]
    share = f"{100 * counts['samples'] / total['samples']:.1f} %"
    return [name, _n(counts["samples"]), share, *parts, _n(len(own)), _bytes(sum(one["bytes"] for one in own))]


def _values(facts: dict, name: str, title: str, samples: int) -> list[str]:
    values = facts["fields"][name]
    if not values:
        return []
    more = facts["distinct"][name] - len(values)
    shown = ", ".join(f"{_plain(value)} ({_n(count)})" for value, count in values.items())
    beyond = "at least " if facts["beyond"].get(name) else ""
    rest = f", and {beyond}{_n(more)} more" if more > 0 else ""
    silent = samples - facts["said"].get(name, samples)
    none = f" Not said: {_n(silent)}." if silent and name != "translations" else ""
    return [f"## {title}", "", f"{shown}{rest}.{none}", ""]


def _plain(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")


def _done(facts: dict) -> list[str]:
    settings = facts["settings"]
    lines = []
    if settings["dedup"] == "none":
        lines.append("- Copies were not looked for.")
    else:
        lines.append("- Copies (equal pictures, sounds and texts): the first was kept.")
    if settings["dedup"] == "near":
        lines.append(
            "- Near copies: of samples whose parts are all nearly equal the first was kept. Pictures: perceptual hashes "
            f"of 64 bits that differ in at most {dedup.BITS}, and mean colors of sixteen fields by at most "
            f"{dedup.SHADE} of 255; pictures below {dedup.SMALLEST} pixels must be equal. Text: a similarity "
            f"(Jaccard, runs of {dedup.SHINGLE} characters, MinHash) of at least {dedup.JACCARD}. Sounds: equal."
        )
    if len(settings["split"]) > 1:
        shares = ", ".join(f"{share:g}" for share in settings["split"])
        by = f"the field `{settings['group']}` (without it, the content)" if settings["group"] else "the content"
        near = (
            f"; so are those with pictures whose hashes differ in at most {dedup.BITS} bits, or texts of a similarity "
            f"of at least {dedup.TIED}"
            if settings["dedup"] == "near"
            else ""
        )
        lines.append(
            f"- Split {shares} by a hash of {by}. Samples that share a picture, a sound, a text or a translation are on "
            f"one side{near}. The largest such cluster has {_n(facts['largest'])} samples."
        )
        for source in facts["labels"]:
            lines.append(f"- The texts of `{source}` are few and shared by many: labels. They tie no samples together.")
    lines.append(
        "- Every picture and sound was decoded in full, every text read as UTF-8, under the limits that training has."
    )
    if settings["longest_side"]:
        lines.append(f"- Pictures larger than {settings['longest_side']} pixels were made smaller (JPEG, quality 95).")
    if settings["rate"]:
        lines.append(f"- Sounds are FLAC, 16 bits, mono, {settings['rate']} samples a second.")
    lines.append(f"- Samples that are text alone were cut into pieces of at most {_n(settings['piece_bytes'])} bytes.")
    return lines


def _gaps(facts: dict, total: Counter) -> list[str]:
    lines = []
    for name, what in (("license", "licence"), ("language", "language"), ("source", "source")):
        if not facts["fields"][name] and not (name == "language" and facts["fields"]["translations"]):
            lines.append(f"- No sample's JSON says its {what}.")
    if total["samples"] and facts["largest"] > 0.1 * total["samples"]:
        share = 100 * facts["largest"] / total["samples"]
        lines.append(f"- One cluster is {share:.0f} % of all samples: the split's shares cannot be exact.")
    wanted = facts["settings"]["split"]
    for (name, counts), share in zip(facts["splits"].items(), wanted):
        has = counts["samples"] / total["samples"]
        if abs(has - share) > 0.02 + 0.1 * share:
            lines.append(f"- {name} was to have {100 * share:g} % and has {100 * has:.1f} %.")
    missing = len(wanted) - len(facts["splits"])
    if missing:
        lines.append(f"- {missing} of the splits got no sample: there are too few, or too few that share nothing.")
    lines.append("- What the samples say and show was not looked at: nothing was filtered by content.")
    return lines


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _n(count: int) -> str:
    return f"{count:,}"


def _bytes(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    power = min(4, int(math.log10(size) // 3))
    return f"{size / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


# ------------------------------------------------------------------------------------------------------------ Croissant

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
FORMATS = {
    "jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "flac": "audio/flac",
    "wav": "audio/wav", "ogg": "audio/ogg", "mp3": "audio/mpeg", "txt": "text/plain", "json": "application/json",
    "cls": "text/plain",
}  # fmt: skip


def croissant(facts: dict, shards: list[dict], name: str) -> dict:
    """Croissant 1.0: every shard with its size and SHA-256, a file set and a record set for each kind of member."""
    licences = list(facts["fields"]["license"])
    total = sum(counts["samples"] for counts in facts["splits"].values())
    splits = ", ".join(f"{split_} {_n(counts['samples'])}" for split_, counts in facts["splits"].items())
    files = [
        {
            "@type": "cr:FileObject",
            "@id": one["name"],
            "name": one["name"],
            "contentUrl": one["name"],
            "contentSize": f"{one['bytes']} B",
            "encodingFormat": "application/x-tar",
            "sha256": one["sha256"],
        }
        for one in shards
    ]
    endings = [ending for ending in facts["endings"] if ending in FORMATS]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "description": f"{_n(total)} samples in webdataset shards ({splits}); card.md beside them says more.",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        **({"license": licences[0] if len(licences) == 1 else licences} if licences else {}),
        "distribution": files + [_file_set(ending, files) for ending in endings],
        "recordSet": [_record_set(ending) for ending in endings],
    }


def _file_set(ending: str, files: list[dict]) -> dict:
    return {
        "@type": "cr:FileSet",
        "@id": f"{ending}-members",
        "name": f"{ending}-members",
        "description": f"The members KEY.{ending} of the shards.",
        "containedIn": [{"@id": one["@id"]} for one in files],
        "encodingFormat": FORMATS[ending],
        "includes": f"*.{ending}",
    }


def _record_set(ending: str) -> dict:
    modality = "sc:ImageObject" if ending in IMAGE_FILES else "sc:AudioObject" if ending in AUDIO_FILES else "sc:Text"
    fields = (
        (
            "key",
            "sc:Text",
            "The sample's key.",
            {"fileProperty": "filename"},
            {"transform": {"regex": "^(.*/)?([^/.]+)"}},
        ),
        ("content", modality, f"What KEY.{ending} holds.", {"fileProperty": "content"}, {}),
    )
    return {
        "@type": "cr:RecordSet",
        "@id": ending,
        "name": ending,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{ending}/{name}",
                "name": name,
                "description": description,
                "dataType": type_,
                "source": {"fileSet": {"@id": f"{ending}-members"}, "extract": extract, **more},
            }
            for name, type_, description, extract, more in fields
        ],
    }
