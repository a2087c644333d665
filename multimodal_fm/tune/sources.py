"""What a user names to tune on, found and opened: shards, folders, tables, data sets of the Hugging Face hub.

Whatever it is, its samples are read as rows: the fields of the JSON or the table, `text` for the member `txt`, `.cls`
for the member of that name. Media that are no shards yet go through `pack` first.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..corpus import index, shards, storage
from ..corpus.fields import parse, parse_map
from ..errors import SampleError, UserError
from ..pack import fetch, run, tables
from ..pack.samples import AUDIO_FILES, IMAGE_FILES, encode_json, modality_of
from ..pack.settings import Settings
from ..pack.sources import COMPRESSED, PACK_FILES
from ..tokenizers import audio, image, text

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The parts, and what folders, files and splits that hold them are called."""
TABLES = (".csv", ".tsv", ".parquet", ".jsonl", ".json")
PROBED = 200  # rows that are looked at to tell which columns there are
INLINE = 300  # a pack of so many samples is done in this process
TOKENIZERS = (text.Tokenizer(), image.Tokenizer(), audio.Tokenizer())
Row = tuple[str, dict | SampleError]
"""Where a sample stands, for messages, and its fields, or why it has none."""


@dataclass
class Source:
    """Samples of one file, folder or split of a data set.

    Attributes:
        given: what the user named.
        part: train, validation or test where the data say so; else empty.
        rows: reads them from the first on.
        media: the column of each modality that the rows name files of or hold bytes of.
        names: the classes that the whole numbers of a column stand for.
        folders: the class folders that there are, samples or none.
        file: the table, which `pack` can read; empty where the rows must be written to a list first.
        shards: of media. The samples are those of the shards, in order.
        packed: these shards were made here.
    """

    given: str
    part: str
    rows: Callable[[], Iterator[Row]]
    media: dict[str, str] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    file: str = ""
    shards: list[str] = field(default_factory=list)
    packed: bool = False
    lost: list[dict] = field(default_factory=list)  # rows of the pack's quarantine

    def probe(self) -> list[dict]:
        """The first rows that can be read."""
        return [row for _, row in itertools.islice(self.rows(), PROBED) if isinstance(row, dict)]


def find(given: str, work: Path, columns: dict[str, str]) -> list[Source]:
    """The sources under a name. columns: those that the user named, by their role. Raises UserError."""
    if given.startswith("hf:") and "://" not in given:
        return _find_dataset(given, given.removeprefix("hf:"), work, columns)
    if os.path.isdir(given):
        if any((Path(given) / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
            return _find_dataset(given, given, work, columns)
        return _find_folder(given, columns)
    if storage.is_remote(given):
        return [_open_file(given, file, "", columns) for file in shards.list_shards(given, "--data")]
    files = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    files = [file for file in files if not file.endswith(".mmidx")]
    if not files:
        raise UserError(f"{given}: no such file or folder; a data set of the Hugging Face hub is written hf:OWNER/NAME")
    return [_open_file(given, file, "", columns) for file in files]


def part_of(name: str) -> str:
    """The part that a folder or file is called after (`train`, `val-00000.tar`, `test.csv`); empty where none."""
    first = "".join(c if c.isalpha() else " " for c in name.lower()).split()[:1]
    return next((part for part, names in PARTS.items() if first and first[0] in names), "")


def _open_file(given: str, file: str, part: str, columns: dict[str, str]) -> Source:
    lower = file.lower()
    if lower.endswith(".tar"):
        return open_shards(given, part, [file])
    if lower.endswith(COMPRESSED):
        return Source(given, part, lambda: iter(()), file=file)
    if lower.endswith(TABLES):
        source = Source(given, part, lambda: _read_table(file), file=file)
        return _with_media(source, columns)
    kinds = ", ".join((".tar", *COMPRESSED[:1], *TABLES))
    raise UserError(f"{given}: {os.path.basename(file)} has no samples with labels: give a folder, or files of {kinds}")


def _with_media(source: Source, columns: dict[str, str]) -> Source:
    """The source with its columns of media: those named, else those whose first values are names or bytes of media."""
    rows = source.probe()
    fields = list(dict.fromkeys(name for row in rows for name in row))
    for modality, known in (("image", IMAGE_FILES), ("audio", AUDIO_FILES)):
        named = columns.get(modality, "")
        if named and fields and named not in fields:
            raise UserError(
                f"{source.given}: no column {named!r} (--{modality}-column); there are: {', '.join(fields)}"
            )
        found = [name for name in fields if _share(rows, name, modality, known) > 0.5]
        if name := named or next(iter(found), ""):
            source.media[modality] = name
    return source


def _share(rows: list[dict], name: str, modality: str, known: tuple[str, ...]) -> float:
    """The share of a column's values that are media of a modality, by the extension or the first bytes."""

    def holds(value) -> bool:
        value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if isinstance(value, bytes):
            return any(fetch.sniff_extension(value, kind, "") in known for kind in ("image", "audio")) and (
                fetch.sniff_extension(value, modality, "") in known
            )
        return isinstance(value, str) and "\n" not in value and value.lower().rpartition(".")[2] in known

    values = [row[name] for row in rows if row.get(name) not in (None, "")]
    return sum(map(holds, values)) / max(1, len(values))


# ----------------------------------------------------------------------------------------------------------- tables


def _read_table(file: str) -> Iterator[Row]:
    lower = file.lower()
    if lower.endswith(".parquet"):
        if (opened := tables.open_parquet(file)) is None:
            raise UserError(f"{file}: not a Parquet file")
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in opened.iter_batches(batch_size=256))
        yield from ((f"{file} row {number}", row) for number, row in enumerate(rows, 1))
    elif lower.endswith(".json"):
        yield from _read_json(file)
    else:
        what = "line" if lower.endswith(".jsonl") else "row"
        for number, row in tables.read_rows(file):
            yield f"{file} {what} {int(number) + 1}" if number else file, row


def _read_json(file: str) -> Iterator[Row]:
    """A list of objects, or the nested file of SQuAD: `data`, `paragraphs`, `qas` (Rajpurkar et al. 2016)."""
    try:
        data = parse(Path(file).read_bytes())
    except (SampleError, OSError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    data = data.get("data") if isinstance(data, dict) else data
    if not isinstance(data, list):
        raise UserError(f"{file}: holds no list of samples; write an object a line into a .jsonl file")
    number = 0
    for one in data:
        paragraphs = one.get("paragraphs") if isinstance(one, dict) else None
        rows = (
            [{**qa, "context": p.get("context")} for p in paragraphs for qa in p.get("qas", ())]
            if paragraphs
            else [one]
        )
        for row in rows:
            number += 1
            yield f"{file} entry {number}", row if isinstance(row, dict) else SampleError("json", "not an object")


# ---------------------------------------------------------------------------------------------------------- folders


def _find_folder(given: str, columns: dict[str, str]) -> list[Source]:
    """A folder of media (and texts) in class folders or with sidecars; of shards or tables; or of one folder a part."""
    root = Path(given)
    while True:  # a folder in a folder, as archives unpack
        folders, files = _list(root)
        if files or len(folders) != 1 or not _list(root / folders[0])[0]:
            break
        root = root / folders[0]
    parts = {name: part_of(name) for name in folders}
    if len(folders) > 1 and all(parts.values()):
        found = [one for name in folders for one in _find_in(given, root / name, parts[name], columns)]
    else:
        found = _find_in(given, root, "", columns)
    if not found:
        raise UserError(f"{given}: holds no images, sounds, texts, tables or shards")
    return found


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and files in a folder, sorted, hidden ones left out."""
    names = sorted(n for n in os.listdir(folder) if n[0] not in "._" and n not in PACK_FILES)
    folders = [name for name in names if os.path.isdir(folder / name)]
    return folders, [name for name in names if name not in folders and not name.endswith(".mmidx")]


def _find_in(given: str, root: Path, part: str, columns: dict[str, str]) -> list[Source]:
    folders, files = _list(root)
    readable = [file for file in files if file.lower().endswith((".tar", *TABLES, *COMPRESSED))]
    stems = {os.path.splitext(file)[0] for file in files if modality_of(_extension(file)) in ("image", "audio")}
    readable = [file for file in readable if not (file.endswith(".json") and os.path.splitext(file)[0] in stems)]
    opened = [_open_file(given, str(root / file), part or part_of(file), columns) for file in readable]
    if any(source.media and source.file.lower().endswith(TABLES) for source in opened):
        return [source for source in opened if source.media]  # a table that names the folder's media
    if opened and not stems and (not folders or any(source.shards for source in opened)):
        return opened
    rows = _list_samples(root, _walk(root), folders)
    if not rows:
        return opened
    media = {modality: modality for modality in ("image", "audio") if any(modality in row for row in rows)}
    places = [(f"{given} {row['key']}", row) for row in rows]
    inside = [row for row in rows if os.sep in row["key"]]
    labelled = all(row.get("label") == row["key"].split(os.sep)[0] for row in inside)  # by their folders
    return [Source(given, part, lambda: iter(places), media, folders=folders if labelled else [])]


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _walk(root: Path) -> Iterator[str]:
    """The files below, relative to `root`, without hidden ones and without links that lead out of it."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f[0] not in "._")
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name[0] != "." and os.path.isfile(path) and fetch.is_below(path, str(root)):
                yield os.path.relpath(path, root)


def _list_samples(root: Path, files: Iterator[str], classes: list[str]) -> list[dict]:
    """A row for each stem: paths of its media, its text, its JSON, `.cls`, and the class folder it lies in."""
    stems: dict[str, dict] = {}
    for name in files:
        extension, stem = _extension(name), os.path.splitext(name)[0]
        row = stems.setdefault(stem, {})
        if (modality := modality_of(extension)) in ("image", "audio"):
            row.setdefault(modality, os.path.abspath(root / name))
        elif extension in ("txt", "json", "cls"):
            row[extension] = root / name
    rows = []
    for stem, found in stems.items():
        if found.keys().isdisjoint(("image", "audio", "txt")):
            continue
        row = parse_map(found["json"].read_bytes()) if "json" in found else {}
        row |= {modality: found[modality] for modality in ("image", "audio") if modality in found}
        if "txt" in found:
            row["text"] = found["txt"].read_text("utf-8-sig", "surrogateescape").strip()
        if "cls" in found:
            row[".cls"] = found["cls"].read_text("utf-8", "replace").strip()
        if (folder := stem.split(os.sep)[0]) in classes and os.sep in stem:
            row.setdefault("label", folder)
        rows.append({**row, "key": stem})
    return rows


# ---------------------------------------------------------------------------------------------------------- shards


def open_shards(given: str, part: str, files: list[str]) -> Source:
    def rows() -> Iterator[Row]:
        for shard, number, row in read_shards(files):
            yield f"{shard.shard} {shard.key(number)}", row

    return Source(given, part, rows, shards=files)


def read_shards(files: list[str]) -> Iterator[tuple[index.Index, int, dict]]:
    """Index, number there and row of each sample; media are not read. Raises UserError."""
    for file in files:
        opened = index.open_index(file, tokenizers=TOKENIZERS)
        opened.check()
        for number in range(len(opened)):
            members, _ = opened.read(number, ("json", "txt", "cls"))
            row = parse_map(members.get("json"))
            if "txt" in members:
                row["text"] = members["txt"].decode("utf-8-sig", "surrogateescape")
            elif texts := _usual_text(members):
                row["text"] = texts
            if "cls" in members:
                row[".cls"] = members["cls"].decode("utf-8", "replace").strip()
            yield opened, number, row


def _usual_text(members: dict[str, bytes]) -> str:
    try:
        return TOKENIZERS[0].describe({"json": members["json"]}) or "" if "json" in members else ""
    except SampleError:
        return ""


# --------------------------------------------------------------------------------------------------- hub and packing


def _find_dataset(given: str, path: str, work: Path, columns: dict[str, str]) -> list[Source]:
    """The splits of a data set. Those with media become Parquet files, which `pack` reads."""
    dataset = tables.load_dataset(path)
    sources = []
    for split in map(str, dataset) if isinstance(dataset, dict) else [""]:
        loaded = tables.load_split(path, split)
        names = {}
        for name, feature in loaded.features.items():
            feature = getattr(feature, "feature", feature)  # of a sequence
            if known := getattr(feature, "names", None):
                names[name] = list(known)

        def rows(loaded=loaded, split=split) -> Iterator[Row]:
            for number, row in enumerate(loaded, 1):
                yield f"{given} {split} row {number}", dict(row)

        source = _with_media(Source(given, part_of(split), rows, names=names), columns)
        if source.media:
            work.mkdir(parents=True, exist_ok=True)
            source.file = str(work / f"{hashlib.sha256(given.encode()).hexdigest()[:8]}-{split or 'all'}.parquet")
            if not os.path.exists(source.file):
                loaded.to_parquet(f"{source.file}.part")
                os.replace(f"{source.file}.part", source.file)
        sources.append(source)
    return sources


def pack_media(source: Source, work: Path) -> Source:
    """The source as shards, packed into `work`; a pack that was stopped is resumed. Raises UserError."""
    work.mkdir(parents=True, exist_ok=True)
    file, media, key, texts = source.file, source.media, "", ""
    if not file or file.lower().endswith(".json"):
        file = str(work / "list.jsonl")
        if not source.file:  # of a folder
            key, texts = "key", "text" if any("text" in row for row in source.probe()) else ""
        if not os.path.exists(file):  # else it is that of the pack that was stopped
            rows = (json.loads(encode_json(row)) for _, row in source.rows() if isinstance(row, dict))
            storage.write_atomic(file, (json.dumps(row, ensure_ascii=True).encode() + b"\n" for row in rows))
    count = len(list(itertools.islice(source.rows(), INLINE + 1)))  # 0: not known
    settings = Settings(
        [file],
        image_column=media.get("image", ""),
        audio_column=media.get("audio", ""),
        text_column=texts,
        key_column=key,
        dedup="none",
        allow_outside=file.startswith(os.path.join(work.parent, "")),  # a list of our own
    )
    packed = work / "packed"
    try:
        run.pack(settings, packed, workers=0 if 0 < count <= INLINE else min(4, os.cpu_count() or 1))
    except UserError as error:
        lost = next(iter(_lost(packed)), None)
        why = f"nothing in it can be read; the first is {lost['key']}: {lost['detail']}" if lost else str(error)
        raise UserError(f"{source.given}: {why}") from None
    done, lost = open_shards(source.given, source.part, sorted(map(str, packed.glob("*.tar")))), _lost(packed)
    return replace(source, rows=done.rows, shards=done.shards, packed=True, lost=lost)


def _lost(packed: Path) -> list[dict]:
    """The rows of a pack's quarantine."""
    file = packed / "quarantine.jsonl"
    return [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def stamp(given: str) -> str:
    """What changes when the files under a name do."""
    files = []
    for path in [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True)):
        if os.path.isdir(path):
            files += [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        else:
            files.append(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in files if not file.endswith(".mmidx")):
        try:
            stat = os.stat(file)
            digest.update(f"{os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "replace"))
        except OSError:
            continue
    return digest.hexdigest()
