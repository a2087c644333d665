"""The data card: what a pack holds. `card.md` is for people, `croissant.json` for programs.

Samples, bytes, sizes and tokens are counted by `inspect`, from the indexes of the shards that were written; only what
the shards do not tell (copies, what was left out) is counted while packing.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from ..corpus import index
from ..corpus.fields import lookup
from ..inspect.stats import count_corpus
from ..pack import dedup
from ..pack.samples import modality_of
from ..pack.settings import SPLITS, Settings
from ..pack.sources import Source, SourceIndex
from ..tokenizers import audio, image, text
from .model_card import escape

MAX_DISTINCT = 10_000  # values of a field that are counted apart
SHOWN = 12  # of them that the card shows
SHOWN_SOURCES = 100
FIELDS = {
    "language": ("language", "lang", "original_data.language", "original_data.lang"),
    "license": ("license", "licence", "original_data.license", "original_data.licence"),
    "source": ("source", "original_data.source"),
    "label": ("label",),
}
"""Where a sample's JSON has what the card counts."""
MODALITIES = {"text": "text", "image": "an image", "audio": "audio"}


def about(row: dict, members: dict[str, bytes]) -> dict:
    """What the card counts of a sample's JSON: a value, or a list of them, by field."""
    values = {}
    for name, paths in FIELDS.items():
        value = next((v for v in (lookup(row, path) for path in paths) if isinstance(v, (str, int))), None)
        if value is not None and value != "":
            values[name] = str(value)[:100]
    if isinstance(row.get("captions"), dict):
        values["translations"] = sorted(str(k)[:40] for k in row["captions"])[:500]
    if "label" not in values and "cls" in members:
        values["label"] = members["cls"][:20].decode("utf-8", "replace").strip()
    return values


class Facts:
    """Counts, sample by sample, what the shards do not tell; `data()` is plain data."""

    def __init__(
        self, settings: Settings, sources: list[Source], indexes: list[SourceIndex], labels: list[str], largest: int
    ):
        self.settings, self.labels, self.largest = settings, labels, largest
        self.sources = {source.family: Counter() for source in sources}
        self.columns = {s.family: [one.columns, one.unused] for s, one in zip(sources, indexes) if one.columns}
        self.refused: Counter = Counter()
        self.fields = {name: Counter() for name in (*FIELDS, "translations")}
        self.uncounted: Counter = Counter()  # values beyond the first MAX_DISTINCT
        self.stated: Counter = Counter()  # samples that have the field
        self.extensions: Counter = Counter()

    def count(self, source: Source, outcome: str) -> None:
        self.sources[source.family][outcome] += 1

    def add(self, record: dict) -> None:
        """Count a sample that is kept."""
        self.extensions.update(extension for extension, _, _ in record["members"])
        for name, value in record["about"].items():
            self.stated[name] += 1
            for one in value if isinstance(value, list) else [value]:
                if one in self.fields[name] or len(self.fields[name]) < MAX_DISTINCT:
                    self.fields[name][one] += 1
                else:
                    self.uncounted[name] += 1

    def data(self) -> dict:
        settings = self.settings
        names = ("split", "group", "dedup", "longest_side", "rate", "piece_bytes", "text_block")
        return {
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "columns": self.columns,
            "refused": dict(sorted(self.refused.items())),
            "fields": {name: dict(counter.most_common(SHOWN)) for name, counter in self.fields.items()},
            "distinct": {name: len(counter) for name, counter in self.fields.items()},
            "uncounted": dict(self.uncounted),
            "stated": dict(self.stated),
            "extensions": dict(sorted(self.extensions.items())),
            "labels": self.labels,
            "largest": self.largest,
            "settings": {name: getattr(settings, name) for name in names},
        }


def measure(facts: dict, folder: Path, shards: list[dict]) -> dict:
    """The facts with what `inspect` says of all shards (`total`) and of each split (`splits`)."""
    tokenizers = {"text": text.Tokenizer(), "image": image.Tokenizer(), "audio": audio.Tokenizer()}
    indexes = {one["name"]: index.open_index(str(folder / one["name"])) for one in shards}
    splits = {split: [one for name, one in indexes.items() if name.startswith(f"{split}-")] for split in SPLITS}
    splits = {split: _measure(held, tokenizers) for split, held in splits.items() if held}
    return facts | {"splits": splits, "total": _measure(list(indexes.values()), tokenizers)}


def _measure(indexes: list[index.Index], tokenizers: dict) -> dict:
    data = count_corpus(indexes, tokenizers).data
    return {name: data[name] for name in ("shards", "samples", "bytes", "tokens", "modalities")}


# -------------------------------------------------------------------------------------------------------------- card.md


def markdown(facts: dict, shards: list[dict]) -> str:
    """The card as a page."""
    splits, total = facts["splits"], facts["total"]
    held = [f"{_n(_samples(total, m))} with {what}" for m, what in MODALITIES.items() if _samples(total, m)]
    many = f"{_n(total['shards'])} shard{'s' * (total['shards'] != 1)}"
    opening = f"{_n(total['samples'])} samples ({', '.join(held)}) in {many}, {_bytes(total['bytes'])}."
    lines = ["# Data card", "", opening, ""]
    lines += _table(
        ["split", "samples", "share", *(f"with {what}" for what in MODALITIES.values()), "shards", "bytes"],
        [
            [
                name,
                _n(one["samples"]),
                f"{100 * one['samples'] / total['samples']:.1f} %",
                *(_n(_samples(one, modality)) for modality in MODALITIES),
                _n(one["shards"]),
                _bytes(one["bytes"]),
            ]
            for name, one in splits.items()
        ],
    )
    lines += ["## Size", ""]
    lines += _table(
        ["split", "text (bytes)", "images (megapixels)", "audio (hours)", "tokens, about"],
        [
            [
                name,
                _n(one["modalities"].get("text", {}).get("bytes", 0)),
                f"{one['modalities'].get('image', {}).get('pixels', 0) / 1e6:,.1f}",
                f"{one['modalities'].get('audio', {}).get('hours', 0):,.2f}",
                _n(one["tokens"]),
            ]
            for name, one in splits.items()
        ],
    )
    lines += ["Counted as `mmfm inspect` does: tokens of the default tokenizers, text at four bytes a token.", ""]
    lines += _measures(total["modalities"])
    lines += ["Members: " + ", ".join(f"{_n(n)} .{e}" for e, n in facts["extensions"].items()) + ".", ""]
    lines += ["## Sources", ""]
    lines += _table(
        ["source", "samples kept", "copies", "near copies", "nothing readable"],
        [
            [f"`{escape(name)}`", *(_n(c.get(k, 0)) for k in ("samples", "copy", "near-copy", "lost"))]
            for name, c in list(facts["sources"].items())[:SHOWN_SOURCES]
        ],
    )
    if (more := len(facts["sources"]) - SHOWN_SOURCES) > 0:
        lines += [f"And {_n(more)} more.", ""]
    lines += [line for one in describe_columns(facts, "`") for line in (f"{one}.", "")]
    for name, title in (
        ("source", "Where samples say they come from"),
        ("license", "Licenses"),
        ("language", "Languages"),
        ("translations", "Languages of captions"),
        ("label", "Labels, of all sources together"),
    ):
        lines += _values(facts, name, title)
    lines += ["## What was done", "", *_done(facts), "", "## Left out", ""]
    if facts["refused"]:
        lines += _table(["reason", "count"], [[why, _n(count)] for why, count in facts["refused"].items()])
        lines += ["`quarantine.jsonl` names each: a sample, or one modality of a sample whose others were kept.", ""]
    else:
        lines += ["Nothing.", ""]
    return "\n".join([*lines, "## Known gaps", "", *_gaps(facts), ""])


def describe_columns(facts: dict, quote: str = "") -> list[str]:
    """A line for each table: which column was read as what, and which are kept in the JSON alone."""
    lines = []
    for name, (columns, unused) in list(facts["columns"].items())[:SHOWN_SOURCES]:
        used = ", ".join(f"{role} from column {escape(column)}" for role, column in columns.items())
        others = ", ".join(map(escape, unused[:20])) + ", ..." * (len(unused) > 20)
        rest = f"; in the JSON only: {others}" if unused else ""
        lines.append(f"{quote}{escape(name)}{quote}: {used}{rest}")
    return lines


def _samples(measured: dict, modality: str) -> int:
    return measured["modalities"].get(modality, {}).get("samples", 0)


def _measures(modalities: dict) -> list[str]:
    sizes = modalities.get("image", {}).get("resolution", {})
    seconds = modalities.get("audio", {}).get("seconds", {})
    rows = [["image (pixels)", *(f"{w} x {h}" for w, h in sizes.values())]] if sizes else []
    rows += [["audio (seconds)", *(f"{value:g}" for value in seconds.values())]] if seconds else []
    if not rows:
        return []
    lines = ["## Images and audio", "", *_table(["", "least", "10 %", "median", "90 %", "most"], rows)]
    if rates := modalities.get("audio", {}).get("rates"):
        most = sorted(rates.items(), key=lambda rate: -rate[1])[:SHOWN]
        lines += ["Samples a second: " + ", ".join(f"{rate} ({_n(count)})" for rate, count in most) + ".", ""]
    return lines


def _values(facts: dict, name: str, title: str) -> list[str]:
    values = facts["fields"][name]
    if not values:
        return []
    more = facts["distinct"][name] - len(values)
    shown = ", ".join(f"{_plain(value)} ({_n(count)})" for value, count in values.items())
    rest = f", and {'at least ' * (name in facts['uncounted'])}{_n(more)} more" if more > 0 else ""
    silent = facts["total"]["samples"] - facts["stated"].get(name, 0)
    none = f" Not stated: {_n(silent)}." if silent and name != "translations" else ""
    return [f"## {title}", "", f"{shown}{rest}.{none}", ""]


def _plain(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")


def _done(facts: dict) -> list[str]:
    settings = facts["settings"]
    near = settings["dedup"] == "near"
    lines = ["- Copies were not looked for."]
    if settings["dedup"] != "none":
        lines = [
            "- Copies (equal images, audio, texts, labels and other fields, but for ids, paths, URLs and sizes): the "
            "first was kept."
        ]
    if near:
        lines.append(
            "- Near copies: of samples that are nearly equal in all modalities, and equal in their other fields, the "
            f"first was kept. Images: perceptual hashes of 64 bits that differ in at most {dedup.MAX_BITS}, and mean "
            f"colors of sixteen fields by at most {dedup.MAX_COLOR} of 255; images below {dedup.MIN_SIDE} pixels must "
            f"be equal. Text: a Jaccard similarity (runs of {dedup.SHINGLE} characters, by MinHash) of at least "
            f"{dedup.NEAR_TEXT}. Audio: equal."
        )
    if len(settings["split"]) > 1:
        shares = ", ".join(f"{share:g}" for share in settings["split"])
        by = f"the field `{settings['group']}` (without it, the content)" if settings["group"] else "the content"
        alike = (
            f"; so are those with images whose hashes differ in at most {dedup.MAX_BITS} bits, or texts of a "
            f"similarity of at least {dedup.TIED_TEXT}"
        )
        lines.append(
            f"- Split {shares} by a hash of {by}. Samples that share an image, audio, a text or a translation, and "
            f"pieces of one document, are in one split{alike * near}. The largest such cluster has "
            f"{_n(facts['largest'])} samples."
        )
        for source in facts["labels"]:
            lines.append(f"- The texts of `{source}` are few and shared by many: labels. They tie no samples together.")
    lines.append(
        "- Every image and all audio was decoded in full, every text read as UTF-8, under the limits that training has."
    )
    if settings["longest_side"]:
        lines.append(f"- Images larger than {settings['longest_side']} pixels were made smaller (JPEG, quality 95).")
    if settings["rate"]:
        lines.append(f"- Audio is FLAC, 16 bits, mono, {settings['rate']} samples a second.")
    if codec := facts.get("codec"):
        lines.append(
            f"- `.{codec['member']}` holds codes of each sample's {codec['modality']}: a codebook of "
            f"{_n(codec['codebook_size'])} ({codec['quantizer'].upper()}), made by the codec with the SHA-256 "
            f"`{codec['sha256']}`."
        )
    most = settings["text_block"] or settings["piece_bytes"]
    lines.append(f"- Samples that are text alone were cut into pieces of at most {_n(most)} bytes.")
    if settings["text_block"]:
        lines.append(
            f"- Texts that follow each other were joined to blocks of at most {_n(settings['text_block'])} bytes, the "
            "list `documents` of a sample: sources are counted by document, splits by block. Other fields of the texts "
            "were left out."
        )
    return lines


def _gaps(facts: dict) -> list[str]:
    lines, total = [], facts["total"]["samples"]
    for name in ("license", "language", "source"):
        if not facts["fields"][name] and not (name == "language" and facts["fields"]["translations"]):
            lines.append(f"- No sample's JSON states its {name}.")
    if facts["largest"] > 0.1 * total:
        share = 100 * facts["largest"] / total
        lines.append(f"- One cluster is {share:.0f} % of all samples: the split's shares cannot be exact.")
    for (name, one), share in zip(facts["splits"].items(), facts["settings"]["split"]):
        has = one["samples"] / total
        if abs(has - share) > 0.02 + 0.1 * share:
            lines.append(f"- {name} was to have {100 * share:g} % and has {100 * has:.1f} %.")
    lines.append("- What the samples say and show was not looked at: nothing was filtered by content.")
    return lines


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _n(count: int) -> str:
    return f"{count:,}"


def _bytes(size: int) -> str:
    power = min(4, int(math.log10(size) // 3)) if size else 0
    return f"{size / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}" if power else f"{size} B"


# ------------------------------------------------------------------------------------------------------------ Croissant

TERMS = """citeAs column equivalentProperty extract field fileProperty fileObject fileSet format includes isLiveDataset
jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate separator source subField
transform"""
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{term: f"cr:{term}" for term in TERMS.split()},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
"""The JSON-LD context of Croissant 1.0 (MLCommons)."""
FORMATS = {
    "jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "flac": "audio/flac",
    "wav": "audio/wav", "ogg": "audio/ogg", "mp3": "audio/mpeg", "txt": "text/plain", "json": "application/json",
    "cls": "text/plain", "codes.npy": "application/x-npy",
}  # fmt: skip


def croissant(facts: dict, shards: list[dict], name: str) -> dict:
    """Croissant 1.0: every shard with its size and SHA-256, a file set and a record set for each kind of member."""
    licenses = list(facts["fields"]["license"])
    splits = ", ".join(f"{split} {_n(one['samples'])}" for split, one in facts["splits"].items())
    samples = _n(facts["total"]["samples"])
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
    extensions = [extension for extension in facts["extensions"] if extension in FORMATS]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "description": f"{samples} samples in webdataset shards ({splits}); card.md beside them says more.",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        **({"license": licenses[0] if len(licenses) == 1 else licenses} if licenses else {}),
        "distribution": files + [_file_set(extension, files) for extension in extensions],
        "recordSet": [_record_set(extension) for extension in extensions],
    }


def _file_set(extension: str, files: list[dict]) -> dict:
    return {
        "@type": "cr:FileSet",
        "@id": f"{extension}-members",
        "name": f"{extension}-members",
        "description": f"The members KEY.{extension} of the shards.",
        "containedIn": [{"@id": one["@id"]} for one in files],
        "encodingFormat": FORMATS[extension],
        "includes": f"*.{extension}",
    }


def _record_set(extension: str) -> dict:
    data_type = {"image": "sc:ImageObject", "audio": "sc:AudioObject"}.get(modality_of(extension), "sc:Text")
    regex = {"transform": {"regex": "^(.*/)?([^/.]+)"}}
    fields = (
        ("key", "sc:Text", "The sample's key.", {"fileProperty": "filename"}, regex),
        ("content", data_type, f"What KEY.{extension} holds.", {"fileProperty": "content"}, {}),
    )
    return {
        "@type": "cr:RecordSet",
        "@id": extension,
        "name": extension,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{extension}/{name}",
                "name": name,
                "description": description,
                "dataType": type_,
                "source": {"fileSet": {"@id": f"{extension}-members"}, "extract": extract, **more},
            }
            for name, type_, description, extract, more in fields
        ],
    }
