"""Whatever holds samples, read alike: `places` finds what there is, `prepare` numbers its samples, `read` reads one.

Nothing that a source names is ever a path to write to. Links that lead out of a folder are not followed.
"""

from __future__ import annotations

import bz2
import csv
import functools
import glob
import gzip
import lzma
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..corpus import index, shards
from ..errors import SampleError, UserError
from . import tables
from .samples import AUDIO_FILES, IMAGE_FILES, SIDE_CARS, Raw, dumped
from .settings import Settings

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
OURS = ("card.md", "croissant.json", "quarantine.jsonl")
TABLES = (".csv", ".tsv", ".parquet")
UNPACKED = 100 << 30  # bytes that a compressed tar may become
RATIO, FREE = 200, 1 << 30  # how many times its size it may become, beyond the first GiB
NAME = re.compile(r"[A-Za-z0-9_.-]{1,24}")  # the endings that a shard's member may have


@dataclass(frozen=True)
class Place:
    """Something that holds samples: a file, a folder of media, a data set of the hub."""

    source: str  # as the user named it
    kind: str  # shard, packed, table, rows, folder, hub
    name: str  # as the ledger and the card say it
    part: str = ""  # hub: the split
    path: str = ""  # from the root on, wherever the next command is given

    @property
    def family(self) -> str:
        """What the card calls it: shards whose names differ in their numbers alone are one."""
        if self.kind in ("folder", "hub"):
            return f"{self.name}{':' if self.part else ''}{self.part}"
        folder, name = os.path.split(self.name)
        stem, dot, endings = name.partition(".")
        return os.path.join(folder, re.sub(r"\d{3,}$", "*", stem) + dot + endings)


@dataclass
class Listing:
    """How many samples a place has, what of it is refused, which words are its labels and which columns are read."""

    count: int
    refused: list[dict] = field(default_factory=list)  # key, part, reason, detail
    labels: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    stamp: list = field(default_factory=list)  # the file's size and time, so that a change is seen


def places(settings: Settings, out: Path) -> list[Place]:
    """All that the sources name, in their order. Raises UserError where one names nothing that can be read."""
    found = []
    for source in settings.sources:
        found += _places(source, settings, out)
    return [replace(one, path=os.path.abspath(one.name) if os.path.exists(one.name) else one.name) for one in found]


def _places(source: str, settings: Settings, out: Path) -> list[Place]:
    if "://" in source or source.startswith("pipe:"):
        raise UserError(f"{source}: copy it here first; only the columns of a table may hold URLs")
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            return _hub(source, local=True)
        inside = [file for file in _files(path, out) if _kind(file, settings) not in (None, "text")]
        media = any(_kind(file, settings) in (None, "text") for file in _files(path, out))
        folder = [Place(source, "folder", source)] if media or not inside else []
        return folder + [Place(source, _kind(file, settings), str(path / file)) for file in inside]
    files = [source] if path.is_file() else sorted(glob.glob(source, recursive=True))
    if not files:
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            return _hub(source, local=False)
        raise UserError(f"{source}: no such file or folder")
    made = []
    for file in files:
        kind = _kind(file, settings)
        if kind is None or not os.path.isfile(file):
            known = ", ".join((*shards.SHARDS, *PACKED, *TABLES))
            raise UserError(f"{file}: not a folder of media, a data set, or a file of {known}")
        made.append(Place(source, "shard" if kind == "text" else kind, file))
    return made


def _kind(name: str, settings: Settings) -> str | None:
    """How a file of that name is read; `text` may be a caption, None is none of ours (a picture, a sound, ...)."""
    lower = name.lower()
    if lower.endswith(PACKED):
        return "packed"
    if lower.endswith(TABLES):
        return "table"
    if lower.endswith(".jsonl"):
        return "rows" if settings.columns else "shard"
    if lower.endswith(".txt"):
        return "text"
    return "shard" if lower.endswith(".tar") else None


def _files(root: Path, out: Path) -> Iterator[str]:
    """The files below `root`, folder by folder in the order of their names, hidden ones and the output left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f[0] != "." and Path(folder, f).resolve() != out)
        ours = OURS if os.path.isdir(os.path.join(folder, ".pack")) else ()  # something packed before
        for name in sorted(files):
            if name[0] != "." and name not in ours and not name.endswith(".mmidx"):
                yield os.path.relpath(os.path.join(folder, name), root)


def _hub(source: str, local: bool) -> list[Place]:
    dataset = tables.load_hub(source)
    parts = [str(part) for part in dataset] if isinstance(dataset, dict) else [""]
    return [Place(source, "hub", source, part) for part in parts]


def prepare(place: Place, settings: Settings, base: str) -> Listing:
    """Count a place's samples, and write beside `base` whatever reading one of them at random needs."""
    stamp = _stamp(place.path) if place.kind not in ("folder", "hub") else []
    listing = _PREPARE[place.kind](place, settings, base)
    listing.stamp = stamp
    return listing


def _stamp(path: str) -> list:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return [found.st_size, found.st_mtime_ns]


def changed(place: Place, listing: Listing) -> bool:
    return bool(listing.stamp) and _stamp(place.path) != listing.stamp


def _linked(place: Place, base: str) -> str:
    """Where a shard is read: a link to it in the state, so that its index is written there and not beside it."""
    ending = ".tar" if place.kind == "packed" else os.path.splitext(place.path)[1].lower()
    if place.kind != "packed" and not os.path.lexists(base + ending):
        os.symlink(place.path, base + ending)
    return base + ending


def _open_shard(path: str, piece: int) -> tuple[shards.Corpus | None, list[dict]]:
    """The corpus of one file (None where it holds no sample) and what of it is refused."""
    found = index.opened(path, piece)
    refused = [_refusal(r.key, r.part, r.reason, r.detail) for r in found.refused]
    return shards.Corpus(shards.Config(shards=[path], piece=piece), path) if len(found) else None, refused


def _refusal(key: str, part: str, reason: str, detail: str) -> dict:
    return {"key": key, "part": part, "reason": reason, "detail": detail}


def _prepare_shard(place: Place, settings: Settings, base: str) -> Listing:
    corpus, refused = _open_shard(_linked(place, base), settings.piece_bytes)
    return Listing(len(corpus) if corpus else 0, refused)


def _prepare_packed(place: Place, settings: Settings, base: str) -> Listing:
    try:
        unpack(place.path, f"{base}.tar")
    except SampleError as error:
        corpus, refused = _open_shard(f"{base}.tar", settings.piece_bytes)
        broken = [_refusal("", "", error.reason, error.detail)]
        return Listing(len(corpus) if corpus else 0, broken + [one for one in refused if one["key"]])
    corpus, refused = _open_shard(f"{base}.tar", settings.piece_bytes)
    return Listing(len(corpus) if corpus else 0, refused)


def unpack(path: str, to: str) -> None:
    """Decompress; what came before damage is kept. Raises SampleError where it is damaged or grows beyond the limits."""
    most = min(UNPACKED, max(FREE, RATIO * os.path.getsize(path)))
    size = 0
    with open(to, "wb") as sink:
        try:
            with _opener(path)(path) as packed:
                while block := packed.read1(1 << 20):
                    size += len(block)
                    if size > most:
                        raise SampleError("byte-limit", f"{os.path.getsize(path)} bytes become more than {most}")
                    sink.write(block)
                os.fsync(sink.fileno())
        except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
            raise SampleError("shard", f"cannot be decompressed after {size} bytes: {error}"[:200]) from None
        except Exception as error:  # zlib and zstandard have errors of their own
            if isinstance(error, (SampleError, UserError)):
                raise
            raise SampleError("shard", f"cannot be decompressed after {size} bytes: {error}"[:200]) from None


def _opener(path: str):
    lower = path.lower()
    if lower.endswith((".gz", ".tgz")):
        return gzip.open
    if lower.endswith((".bz2", ".tbz2")):
        return bz2.open
    if lower.endswith((".xz", ".txz")):
        return lzma.open
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard as zstd
        except ImportError:
            raise UserError(f"{path}: .zst needs `pip install zstandard`, or Python 3.14") from None
    return lambda file: zstd.open(file, "rb")


def _prepare_folder(place: Place, settings: Settings, base: str) -> Listing:
    """Files of one stem are a sample. Where all are media alone, one folder down, the folders' names are labels."""
    root, out = Path(place.path), Path(base).parents[2]
    true_root = os.path.realpath(root)
    lines, refused = tables.Lines(base), []
    labels, labelled = set(), True
    for stem, names in _stems(_files(root, out)):
        files, other = {}, []
        for name in names:
            ending = os.path.splitext(name)[1][1:].lower()
            if _kind(name, settings) not in (None, "text"):
                continue  # a place of its own
            if ending not in (*IMAGE_FILES, *AUDIO_FILES, *SIDE_CARS):
                other.append((name, f"no text, picture or sound: {name}"[:200]))
            elif not os.path.realpath(root / name).startswith(true_root + os.sep):
                other.append((name, f"a link out of the folder: {name}"[:200]))
            elif ending in files:
                other.append((name, f"the same stem and ending came before: {name}"[:200]))
            else:
                files[ending] = name
        refused += [_refusal(stem, "", "name", detail) for _, detail in other]
        if files and not (set(files) - {"json", "cls"}):
            refused += [_refusal(stem, "", "name", f"a side-car of nothing: {name}"[:200]) for name in files.values()]
        elif files:
            above = os.path.dirname(stem)
            labelled &= bool(above) and os.sep not in above and not any(s in files for s in SIDE_CARS)
            if len(labels) < tables.LABELS:
                labels.add(above)
            lines.add([stem, files])
    count = lines.close()
    return Listing(count, refused, sorted(labels) if labelled and len(labels) > 1 else [])


def _stems(files: Iterator[str]) -> Iterator[tuple[str, list[str]]]:
    """Files grouped by their name without its ending; `files` come folder by folder, by name."""
    folder, groups = None, {}
    for name in files:
        above = os.path.dirname(name)
        if above != folder:
            yield from sorted(groups.items())
            folder, groups = above, {}
        groups.setdefault(os.path.splitext(name)[0], []).append(name)
    yield from sorted(groups.items())


def _prepare_rows(place: Place, settings: Settings, base: str) -> Listing:
    """JSON lines whose columns are named."""
    corpus, refused = _open_shard(_linked(place, base), settings.piece_bytes)
    if corpus is None:
        return Listing(0, refused)
    known, wanted = set(), set(settings.columns.values())
    for number in range(len(corpus)):
        known |= corpus.json(number).keys()
        if number >= 100 and wanted <= known:
            break
    columns = tables.choose(place.name, settings, sorted(known))
    labels = (
        tables.label_words(corpus.json(i).get(columns["label"]) for i in range(len(corpus)))
        if "label" in columns
        else []
    )
    return Listing(len(corpus), refused, labels, columns)


def _prepare_table(place: Place, settings: Settings, base: str) -> Listing:
    if place.path.lower().endswith(".parquet"):
        return _prepare_parquet(place, settings)
    lines, refused, labels = tables.Lines(base), [], []
    header, columns = None, {}
    try:
        for number, row in enumerate(tables.csv_rows(place.path)):
            if header is None:
                header = [name.strip() for name in row]
                columns = tables.choose(place.name, settings, header)
            elif len(row) != len(header):
                detail = f"{len(row)} values, the header has {len(header)}"
                refused.append(_refusal(str(number - 1), "", "decode", detail))
            else:
                lines.add([number - 1, dict(zip(header, row))])
                if "label" in columns:
                    labels.append(row[header.index(columns["label"])])
                    labels = labels if len(labels) < 10 * tables.LABELS else sorted(set(labels))
    except csv.Error as error:
        refused.append(_refusal("", "", "decode", f"after row {len(lines.starts)}: {error}"[:200]))
    return Listing(lines.close(), refused, tables.label_words(labels), columns)


def _prepare_parquet(place: Place, settings: Settings) -> Listing:
    file = tables.parquet(place.path)
    if file is None:
        return Listing(0, [_refusal("", "", "shard", "not a Parquet file")])
    columns = tables.choose(place.name, settings, file.schema_arrow.names)
    labels = []
    if "label" in columns:
        seen = set()
        for batch in file.iter_batches(columns=[columns["label"]]):
            seen.update(batch.column(0).to_pylist())
            if len(seen) > 10 * tables.LABELS:
                break
        labels = tables.label_words(seen)
    return Listing(file.metadata.num_rows, [], labels, columns)


def _prepare_hub(place: Place, settings: Settings, base: str) -> Listing:
    dataset = tables.hub_part(place.path, place.part)
    found = dict(settings.columns)
    labels = []
    for name, feature in dataset.features.items():
        kind = type(feature).__name__
        if kind in ("Image", "Audio"):
            found.setdefault(kind.lower(), name)
        elif kind == "ClassLabel":
            found.setdefault("label", name)
    columns = tables.choose(place.name, settings, list(dataset.features), found)
    if "label" in columns:
        feature = dataset.features[columns["label"]]
        labels = list(getattr(feature, "names", ())) or tables.label_words(dataset.unique(columns["label"]))
    return Listing(len(dataset), [], labels, columns)


_PREPARE = {
    "shard": _prepare_shard,
    "packed": _prepare_packed,
    "folder": _prepare_folder,
    "rows": _prepare_rows,
    "table": _prepare_table,
    "hub": _prepare_hub,
}


def read(place: Place, settings: Settings, listing: Listing, base: str, labels: list[str], number: int) -> Raw:
    """Sample `number` of a place; `labels` are all words that stand for classes, in order."""
    if place.kind in ("shard", "packed"):
        return _from_shard(_corpus(_linked(place, base), settings.piece_bytes, tuple(listing.stamp)), number, place)
    if place.kind == "folder":
        return _from_folder(place, tables.read_line(base, number), labels if listing.labels else [])
    if place.kind == "rows":
        corpus = _corpus(_linked(place, base), settings.piece_bytes, tuple(listing.stamp))
        row, folder = corpus.json(number), os.path.dirname(place.path)
        key = corpus.key(number)
        if not row:
            return Raw(f"{_stem(place.path)}-{key}", {}, [("text", SampleError("json", "not a JSON object"))])
    elif place.kind == "hub":
        key, row, folder = number, tables.hub_part(place.path, place.part)[number], os.path.abspath(place.path)
    elif place.path.lower().endswith(".parquet"):
        key, row, folder = number, tables.parquet_row(place.path, number), os.path.dirname(place.path)
    else:
        (key, row), folder = tables.read_line(base, number), os.path.dirname(place.path)
    key = f"{_stem(place.path)}{'-' + place.part if place.part else ''}-{key}"
    words = listing.labels if place.kind == "hub" else labels
    return tables.from_row(row, listing.columns, folder, key, words)


@functools.lru_cache(maxsize=4)
def _corpus(path: str, piece: int, stamp: tuple) -> shards.Corpus:
    return _open_shard(path, piece)[0]


def _from_shard(corpus: shards.Corpus, number: int, place: Place) -> Raw:
    key = corpus.key(number)
    numbered = place.kind == "shard" and not place.path.lower().endswith(".tar")  # a line, or a place in a text
    members, failed = corpus.read(number)
    for ending in [ending for ending in members if not NAME.fullmatch(ending)]:
        del members[ending]
        failed.append(("", SampleError("name", f"the ending {ending[:80]!r}")))
    return Raw(f"{_stem(place.path)}-{key}" if numbered else key, members, failed)


def _stem(path: str) -> str:
    name = os.path.basename(os.path.normpath(path))
    return name.partition(".")[0] or name


def _from_folder(place: Place, row: list, labels: list[str]) -> Raw:
    stem, files = row
    raw = Raw(stem, {})
    for ending, name in files.items():
        try:
            raw.members[ending] = tables.local(os.path.join(place.path, name))
        except SampleError as error:
            raw.failed.append((ending, error))
    if labels and raw.members:
        label = os.path.dirname(stem)
        raw.members |= {"cls": str(labels.index(label)).encode(), "json": dumped({"label": label})}
    return raw
