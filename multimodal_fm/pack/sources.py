"""Sources of samples, read alike: `list_sources` finds them, `index_source` counts their samples, `read` reads one.

No name inside a source is ever used as a path to write to, and links that lead out of a folder are not followed.
"""

from __future__ import annotations

import bz2
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
from .fetch import is_below, read_file
from .samples import AUDIO_FILES, IMAGE_FILES, MAX_BYTES, SIDECARS, RawSample, encode_json
from .settings import Settings

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
TABLES = (".csv", ".tsv", ".parquet")
PACK_FILES = ("card.md", "croissant.json", "quarantine.jsonl")
MAX_UNPACKED = 100 << 30  # bytes that a compressed tar may unpack to
MAX_RATIO, FREE_BYTES = 200, 1 << 30  # and how many times its own size, beyond the first GiB
EXTENSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,23}")  # webdataset keeps names that begin with `_` to itself


@dataclass(frozen=True)
class Source:
    """Something that holds samples: a file, a folder of media, or one split of a data set."""

    given: str  # as the user named it
    kind: str  # shard, compressed, table, folder, dataset
    name: str  # as quarantine.jsonl and the card name it
    split: str = ""  # of a data set
    path: str = ""  # absolute, so that the pack can be resumed from another folder

    @property
    def family(self) -> str:
        """The name in the card: files whose names differ in nothing but their numbers are one source."""
        if self.kind in ("folder", "dataset"):
            return f"{self.name}{':' if self.split else ''}{self.split}"
        folder, name = os.path.split(self.name)
        stem, dot, extensions = name.partition(".")
        return os.path.join(folder, re.sub(r"\d{3,}$", "*", stem) + dot + extensions)


@dataclass
class SourceIndex:
    """What a source holds, found once before its samples are read."""

    count: int
    refused: list[dict] = field(default_factory=list)  # key, part, reason, detail
    labels: list[str] = field(default_factory=list)  # its classes that are words
    numbered: bool = False  # its classes are whole numbers
    names: list[str] = field(default_factory=list)  # what a data set's whole numbers stand for
    columns: dict[str, str] = field(default_factory=dict)  # by role
    unused: list[str] = field(default_factory=list)  # columns that only the JSON keeps
    stamp: list = field(default_factory=list)  # size and time of the file, to notice a change


def list_sources(settings: Settings) -> list[Source]:
    """All sources that the user named, in order. Raises UserError where there is nothing to read under a name."""
    listed = [source for given in settings.sources for source in _list(given, settings)]
    return [replace(s, path=s.path or (os.path.abspath(s.name) if os.path.exists(s.name) else s.name)) for s in listed]


def _list(given: str, settings: Settings) -> list[Source]:
    if given.startswith("hf:") and "://" not in given:
        return _list_splits(given, given.removeprefix("hf:"))
    if "://" in given or given.startswith("pipe:"):
        raise UserError(f"{given}: copy it here first; only the columns of a table may hold URLs")
    path = Path(given)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            return _list_splits(given, given)
        names = list(_walk(path))
        nested = {name: kind for name in names if (kind := _nested_kind(path, name, settings))}
        folder = [Source(given, "folder", given)] if len(nested) < len(names) or not nested else []
        return folder + [Source(given, kind, str(path / name)) for name, kind in nested.items()]
    files = [given] if path.is_file() else sorted(glob.glob(given, recursive=True))
    if not files:
        hub = f" (a data set of the Hugging Face hub is written hf:{given})" if re.fullmatch(HUB_NAME, given) else ""
        raise UserError(f"{given}: no such file or folder{hub}")
    sources = []
    for file in files:
        kind = _kind(file, settings) if os.path.isfile(file) else None
        if kind is None:
            known = ", ".join((*shards.SHARDS, *COMPRESSED, *TABLES))
            raise UserError(f"{file}: not a folder of media, a data set, or a file of {known}")
        sources.append(Source(given, "shard" if kind == "text" else kind, file))
    return sources


HUB_NAME = r"[\w-][\w.-]*/[\w.-]+"


def _list_splits(given: str, path: str) -> list[Source]:
    dataset = tables.load_dataset(path)
    splits = [str(split) for split in dataset] if isinstance(dataset, dict) else [""]
    path = os.path.abspath(path) if os.path.isdir(path) else path
    return [Source(given, "dataset", given, split, path) for split in splits]


def _kind(path: str, settings: Settings) -> str | None:
    """How a file is read, by its name: `text` may be a caption, None is media or none of ours."""
    lower = path.lower()
    if lower.endswith(COMPRESSED):
        return "compressed"
    if lower.endswith(TABLES):
        return "table"
    if lower.endswith(".jsonl"):
        return "table" if settings.columns or tables.has_media_columns(path) else "shard"
    return "text" if lower.endswith(".txt") else "shard" if lower.endswith(".tar") else None


def _nested_kind(root: Path, name: str, settings: Settings) -> str | None:
    """How a file in a folder is read, where it is a source of its own rather than a member of a sample."""
    path = str(root / name)
    if not name.lower().endswith((*COMPRESSED, *TABLES, ".jsonl", ".tar")) or not _usable(root, name):
        return None
    return _kind(path, settings)


def _usable(root: Path, name: str) -> bool:
    """Whether it is a regular file below the folder, links followed."""
    return os.path.isfile(root / name) and is_below(str(root / name), str(root))


def _walk(root: Path) -> Iterator[str]:
    """The files below `root`, folder by folder in the order of their names, without hidden files and cards of packs."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f[0] != ".")
        skipped = PACK_FILES if os.path.isdir(os.path.join(folder, ".pack")) else ()
        for name in sorted(files):
            if name[0] != "." and name not in skipped and not name.endswith(".mmidx"):
                yield os.path.relpath(os.path.join(folder, name), root)


# ---------------------------------------------------------------------------------------------------- counting samples


def index_source(source: Source, settings: Settings, base: str) -> SourceIndex:
    """Count a source's samples; what reading them at random needs is written to files whose names begin with `base`."""
    stamp = stamp_of(source)
    indexed = _INDEX[source.kind](source, settings, base)
    indexed.stamp = stamp
    return indexed


def stamp_of(source: Source) -> list:
    if source.kind in ("folder", "dataset"):
        return []
    try:
        stat = os.stat(source.path)
    except OSError as error:
        raise UserError(f"{source.path}: {error.strerror}") from None
    return [stat.st_size, stat.st_mtime_ns]


def _refusal(key: str, part: str, error: SampleError) -> dict:
    return {"key": key, "part": part, "reason": error.reason, "detail": error.detail}


def _shard_path(source: Source, base: str) -> str:
    """The unpacked tar, or a link to the shard, so that its index is written beside the link, not beside the shard.

    Without a `base` the shard itself.
    """
    if source.kind == "shard" and not base:
        return source.path
    extension = ".tar" if source.kind == "compressed" else os.path.splitext(source.path)[1].lower()
    if source.kind != "compressed" and not os.path.lexists(base + extension):
        os.symlink(source.path, base + extension)
    return base + extension


def _index_shard(source: Source, settings: Settings, base: str) -> SourceIndex:
    path, broken = _shard_path(source, base), []
    if source.kind == "compressed":
        try:
            unpack(source.path, path)
        except SampleError as error:
            broken = [_refusal("", "", error)]
    opened = index.open_index(path, settings.max_text)
    refused = [{"key": r.key, "part": r.member, "reason": r.reason, "detail": r.detail} for r in opened.rejections]
    refused = broken + [one for one in refused if one["key"]] if broken else refused
    return SourceIndex(len(opened), refused, numbered="cls" in opened.extensions)


def unpack(path: str, to: str) -> None:
    """Decompress a tar; what precedes damage is kept. Raises SampleError where it is damaged or grows too large."""
    limit = min(MAX_UNPACKED, max(FREE_BYTES, MAX_RATIO * os.path.getsize(path)))
    size = 0
    with open(to, "wb") as output:
        try:
            with _opener(path)(path) as compressed:
                while block := compressed.read1(1 << 20):
                    size += len(block)
                    if size > limit:
                        raise SampleError("byte-limit", f"{os.path.getsize(path)} bytes become more than {limit}")
                    output.write(block)
        except (SampleError, UserError):
            raise
        except Exception as error:  # zlib, lzma and zstandard have errors of their own
            if getattr(error, "errno", None):  # the disk, not the data
                raise
            raise SampleError("shard", f"cannot be decompressed after {size} bytes: {error}"[:200]) from None
        finally:
            output.flush()
            os.fsync(output.fileno())


def _opener(path: str):
    lower = path.lower()
    if lower.endswith((".gz", ".tgz")):
        return gzip.open
    if lower.endswith((".bz2", ".tbz2")):
        return bz2.open
    if lower.endswith((".xz", ".txz")):
        return lzma.open
    try:
        from compression import zstd  # pyright: ignore[reportMissingImports]  # Python 3.14
    except ImportError:
        try:
            import zstandard as zstd  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(f"{path}: .zst needs `pip install zstandard`, or Python 3.14") from None
    return lambda file: zstd.open(file, "rb")


def _index_folder(source: Source, settings: Settings, base: str) -> SourceIndex:
    """Files of one stem are a sample. Where all are media, one folder down, the folders' names are labels."""
    root, rows, refused = Path(source.path), tables.RowFile(base), []
    labels, labelled, numbered = set(), True, False

    def refuse(stem: str, detail: str) -> None:
        refused.append(_refusal(stem, "", SampleError("name", detail[:200])))

    for stem, names in _by_stem(_walk(root)):
        files = {}
        for name in names:
            extension = os.path.splitext(name)[1][1:].lower()
            if not is_below(str(root / name), source.path):
                refuse(stem, f"a link out of the folder: {name}")
            elif not os.path.isfile(root / name):
                refuse(stem, f"not a regular file: {name}")
            elif _nested_kind(root, name, settings):
                continue  # a source of its own
            elif extension not in (*IMAGE_FILES, *AUDIO_FILES, *SIDECARS):
                refuse(stem, f"no text, image or audio: {name}")
            elif extension in files:
                refuse(stem, f"the same stem and extension came before: {name}")
            else:
                files[extension] = name
        if files and not files.keys() - {"json", "cls"}:
            for name in files.values():
                refuse(stem, f"a sidecar of nothing: {name}")
        elif files:
            folder = os.path.dirname(stem)
            labelled &= bool(folder) and os.sep not in folder and files.keys().isdisjoint(SIDECARS)
            numbered |= "cls" in files
            if len(labels) < tables.MAX_LABELS:
                labels.add(folder)
            rows.add([stem, files])
    return SourceIndex(rows.close(), refused, sorted(labels) if labelled and len(labels) > 1 else [], numbered)


def _by_stem(files: Iterator[str]) -> Iterator[tuple[str, list[str]]]:
    """Group files by their name without the extension; `files` come folder by folder."""
    current, groups = None, {}
    for name in files:
        if (folder := os.path.dirname(name)) != current:
            yield from sorted(groups.items())
            current, groups = folder, {}
        groups.setdefault(os.path.splitext(name)[0], []).append(name)
    yield from sorted(groups.items())


def _index_table(source: Source, settings: Settings, base: str) -> SourceIndex:
    if source.path.lower().endswith(".parquet"):
        return _index_parquet(source, settings)
    rows, refused, labels, names = tables.RowFile(base), [], set(), {}
    columns = None
    for key, row in tables.read_rows(source.path):
        if isinstance(row, SampleError):
            key = f"{_stem(source.path)}-{key}" if key else ""
            refused.append(_refusal(key, "text" if row.reason == "json" else "", row))
            continue
        rows.add([key, row])
        names |= dict.fromkeys(row)
        tables.add_labels(labels, [row.get(settings.label_column)])
        if columns is None and len(rows) >= tables.PROBED and names.keys() >= set(settings.columns.values()):
            columns = tables.choose_columns(source.name, settings, list(names))
    count = rows.close()
    if count and columns is None:
        columns = tables.choose_columns(source.name, settings, list(names))
    return _describe_table(count, refused, labels, columns or {}, list(names))


def _describe_table(count: int, refused: list[dict], labels: set[str], columns: dict, names: list[str]) -> SourceIndex:
    """Labels that are all whole numbers stand for themselves; otherwise all of them are words."""
    numbered = bool(labels) and all(map(tables.is_whole, labels))
    unused = [name for name in names if name not in columns.values()]
    return SourceIndex(count, refused, [] if numbered else sorted(labels), numbered, [], columns, unused)


def _index_parquet(source: Source, settings: Settings) -> SourceIndex:
    file = tables.open_parquet(source.path)
    if file is None:
        return SourceIndex(0, [_refusal("", "", SampleError("shard", "not a Parquet file"))])
    names, labels = file.schema_arrow.names, set()
    columns = tables.choose_columns(source.name, settings, names)
    for batch in file.iter_batches(columns=[columns["label"]]) if "label" in columns else ():
        tables.add_labels(labels, batch.column(0).to_pylist())
    return _describe_table(file.metadata.num_rows, [], labels, columns, names)


def _index_dataset(source: Source, settings: Settings, base: str) -> SourceIndex:
    dataset, typed = tables.load_split(source.path, source.split), {}
    for name, feature in dataset.features.items():
        role = {"Image": "image", "Audio": "audio", "ClassLabel": "label"}.get(type(feature).__name__)
        if role:
            typed.setdefault(role, name)
    columns = tables.choose_columns(source.name, settings, list(dataset.features), typed)
    names = list(getattr(dataset.features.get(columns.get("label")), "names", ()))
    labels: set[str] = set()
    tables.add_labels(labels, dataset.unique(columns["label"]) if "label" in columns and not names else [])
    indexed = _describe_table(len(dataset), [], labels, columns, list(dataset.features))
    return replace(indexed, names=names, labels=names or indexed.labels)


_INDEX = {
    "shard": _index_shard,
    "compressed": _index_shard,
    "folder": _index_folder,
    "table": _index_table,
    "dataset": _index_dataset,
}


def number_classes(sources: list[Source], indexes: list[SourceIndex]) -> dict[str, int]:
    """A number for each label that is a word: in the order of the first source, then what the next ones add.

    Raises UserError where another source numbers its classes itself: one number would stand for two classes.
    """
    worded = next((s.name for s, one in zip(sources, indexes) if one.labels), None)
    numbered = next((s.name for s, one in zip(sources, indexes) if one.numbered), None)
    if worded and numbered:
        raise UserError(
            f"the classes of {numbered} are whole numbers, those of {worded} are words, which would get the same "
            "numbers: pack them into two folders"
        )
    words = dict.fromkeys(word for one in indexes for word in one.labels)
    return {word: number for number, word in enumerate(words)}


# ----------------------------------------------------------------------------------------------------- reading samples


def read(
    source: Source, indexed: SourceIndex, settings: Settings, base: str, classes: dict[str, int], number: int
) -> RawSample:
    """Sample `number` of a source; `classes` numbers the labels that are words."""
    if source.kind in ("shard", "compressed"):
        return _read_from_shard(source, _open_shard(_shard_path(source, base), settings.max_text), number)
    if source.kind == "folder":
        return _read_from_folder(source, tables.read_row(base, number), classes if indexed.labels else {})
    roots, key = (os.path.dirname(source.path),), number
    if source.kind == "dataset":
        row, roots = tables.load_split(source.path, source.split)[number], tables.dataset_roots(source.path)
    elif source.path.lower().endswith(".parquet"):
        row = tables.read_parquet_row(source.path, number)
    else:
        key, row = tables.read_row(base, number)
    key = f"{_stem(source.path)}{'-' + source.split if source.split else ''}-{key}"
    return tables.sample_from_row(row, key, indexed.columns, roots, settings, indexed.names, classes)


@functools.lru_cache(maxsize=4)
def _open_shard(path: str, piece: int) -> index.Index:
    opened = index.open_index(path, piece)
    opened.check()
    return opened


def _read_from_shard(source: Source, shard: index.Index, number: int) -> RawSample:
    key = shard.key(number)
    if source.kind == "shard" and not source.path.lower().endswith(".tar"):  # the number of a line, or an offset
        key = f"{_stem(source.path)}-{key}"
    members, failed = shard.read(number, max_bytes=MAX_BYTES)
    for extension in [extension for extension in members if not EXTENSION.fullmatch(extension)]:
        del members[extension]
        failed.append(("", SampleError("name", f"the extension {extension[:80]!r}")))
    return RawSample(key, members, failed)


def _stem(path: str) -> str:
    name = os.path.basename(os.path.normpath(path))
    return name.partition(".")[0] or name


def _read_from_folder(source: Source, row: list, classes: dict[str, int]) -> RawSample:
    stem, files = row
    sample = RawSample(stem, {})
    for extension, name in files.items():
        try:
            sample.members[extension] = read_file(os.path.join(source.path, name), (source.path,))
        except SampleError as error:
            sample.failed.append((extension, error))
    if classes and sample.members:
        label = os.path.dirname(stem)
        sample.members |= {"cls": str(classes[label]).encode(), "json": encode_json({"label": label})}
    return sample
