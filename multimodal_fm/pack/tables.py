"""Tables: rows whose columns hold pictures, sounds, text and labels (CSV, Parquet, JSON lines, data of the hub)."""

from __future__ import annotations

import array
import csv
import functools
import json
import os
import re
import time
from collections.abc import Iterator

import numpy as np

from ..errors import SampleError, UserError
from .samples import AUDIO_FILES, IMAGE_FILES, LARGEST, TABLE_TEXT, Raw, dumped
from .settings import Settings

SCHEMES = ("http", "https", "s3", "gs", "file")
LABELS = 100_000  # distinct labels at most
ATTEMPTS, PAUSE, PATIENCE = 3, 0.5, 30.0  # downloads: how often, seconds between (doubled), seconds without a byte


class Lines:
    """Rows of JSON on disk and where each begins: written once, read at random."""

    def __init__(self, base: str):
        self.base, self.starts, self.place = base, array.array("Q"), 0
        self.file = open(f"{base}.rows", "wb")

    def add(self, row) -> None:
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        self.starts.append(self.place)
        self.place += self.file.write(line)

    def close(self) -> int:
        with open(f"{self.base}.starts", "wb") as file:
            self.starts.tofile(file)
            for one in (file, self.file):
                one.flush()
                os.fsync(one.fileno())
        self.file.close()
        return len(self.starts)


def read_line(base: str, number: int):
    starts = _starts(base, os.stat(f"{base}.starts").st_mtime_ns)
    with open(f"{base}.rows", "rb") as file:
        file.seek(int(starts[number]))
        return json.loads(file.readline())


@functools.lru_cache(maxsize=64)
def _starts(base: str, stamp: int) -> np.ndarray:
    return np.memmap(f"{base}.starts", "<u8", "r")


def choose(path: str, settings: Settings, names: list[str], found: dict | None = None) -> dict[str, str]:
    """Which column holds what: those that were named, and a usual name for the text. Raises UserError."""
    columns = dict(settings.columns if found is None else found)
    for what, name in columns.items():
        if name not in names:
            shown = ", ".join(map(str, names[:20]))
            raise UserError(f"{path}: no column {name!r} (--{what}-column); there are: {shown}")
    usual = [name for name in TABLE_TEXT if name in names]
    if "text" not in columns and usual:
        columns["text"] = usual[0]
    if not columns.keys() & {"image", "text", "audio"}:
        raise UserError(
            f"{path}: name what its columns hold with --image-column, --audio-column, --text-column; "
            f"there are: {', '.join(map(str, names[:20]))}"
        )
    return columns


def label_words(values) -> list[str]:
    """The distinct labels in order; none where all are whole numbers, which stand for themselves."""
    words = {str(value) for value in values if value is not None and value != ""}
    if len(words) > LABELS:
        raise UserError(f"--label-column has more than {LABELS} different values: it names no classes")
    return [] if all(map(_is_index, words)) else sorted(words)


def _is_index(word: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", word) is not None


def csv_rows(path: str) -> Iterator[list[str]]:
    """Rows of a file whose values stand between commas, tabs or semicolons, whichever its first line has most of."""
    csv.field_size_limit(LARGEST)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline(1 << 20)
        delimiter = max("\t;,", key=first.count)
        file.seek(0)
        yield from (row for row in csv.reader(_without_nul(file), delimiter=delimiter) if row)


def _without_nul(lines):
    return (line.replace("\0", "") for line in lines)


@functools.lru_cache(maxsize=8)
def parquet(path: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs `pip install multimodal_fm[pack]`") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError):
        return None


@functools.lru_cache(maxsize=4)
def load_hub(source: str):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: Hugging Face data sets need `pip install multimodal_fm[hub]`") from None
    try:
        return datasets.load_from_disk(source) if os.path.isdir(source) else datasets.load_dataset(source)
    except Exception as error:  # whatever the hub's library, the network and the builder raise
        first = str(error).strip().partition("\n")[0][:200]
        what = "cannot be loaded" if os.path.isdir(source) else "no such file or folder, and no data set of the hub"
        raise UserError(f"{source}: {what}: {type(error).__name__}: {first}") from None


@functools.lru_cache(maxsize=8)
def hub_part(path: str, part: str):
    """The data set's rows, pictures and sounds as the bytes that they are stored as."""
    dataset = load_hub(path)
    dataset = dataset[part] if part else dataset
    for name, feature in dataset.features.items():
        if type(feature).__name__ in ("Image", "Audio"):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


_held: tuple = (None, None, None)


def parquet_row(path: str, number: int) -> dict:
    """A row of a Parquet file. The batch that it is in is kept: neighbours are asked for one after the other."""
    global _held
    if _held[0] != path or not _held[1] <= number < _held[1] + len(_held[2]):
        file, group, start = parquet(path), 0, 0
        while start + file.metadata.row_group(group).num_rows <= number:
            start += file.metadata.row_group(group).num_rows
            group += 1
        for batch in file.iter_batches(batch_size=64, row_groups=[group]):
            if number < start + len(batch):
                _held = (path, start, batch)
                break
            start += len(batch)
    _, start, batch = _held
    return batch.slice(number - start, 1).to_pylist()[0]


def from_row(row: dict, columns: dict[str, str], folder: str, key: str, labels: list[str]) -> Raw:
    """The sample of a table's row: media by path, URL or as bytes, text, label; all other columns are its JSON."""
    raw = Raw(f"{key if 'key' not in columns else row.get(columns['key'], key)}", {})
    rest = {name: value for name, value in row.items() if not isinstance(value, (bytes, bytearray))}
    for what in ("image", "audio"):
        if what in columns:
            value = row.get(columns[what])
            if isinstance(value, dict):
                rest[columns[what]] = value.get("path")
                value = value.get("bytes") or value.get("path")
            try:
                if value in (None, "", b""):
                    raise SampleError("empty", f"nothing in column {columns[what]}")
                data = bytes(value) if isinstance(value, (bytes, bytearray)) else fetch(str(value), folder)
                raw.members[sniff(data, what, str(value)[-16:])] = data
            except SampleError as error:
                raw.failed.append((what, error))
    if "text" in columns:
        text = rest.get(columns["text"])
        if isinstance(text, str):
            del rest[columns["text"]]
            raw.members["txt"] = _encoded(text)
    if "label" in columns and (label := row.get(columns["label"])) not in (None, ""):
        word = str(label)
        if _is_index(word):
            raw.members["cls"] = word.encode()
            if labels and 0 <= int(word) < len(labels):  # a class of the hub
                rest["label"] = labels[int(word)]
        else:
            raw.members["cls"] = str(labels.index(word)).encode()
            rest["label"] = word
    rest = {name: value for name, value in rest.items() if value is not None and value != ""}
    if rest:
        raw.members["json"] = dumped(rest)
    return raw


def _encoded(text: str) -> bytes:
    """UTF-8; a CSV's bytes that were none come out as they were, for the check to find."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def local(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise SampleError("missing", f"{path}: not there"[:200]) from None
    except (OSError, ValueError) as error:
        raise SampleError("read", f"{path}: {error}"[:200]) from None
    if len(data) > LARGEST:
        raise SampleError("byte-limit", f"more than {LARGEST} bytes")
    return data


def fetch(name: str, folder: str) -> bytes:
    """The bytes at a path (from `folder` on) or URL, at most `LARGEST`. No scheme runs a program. Raises SampleError."""
    scheme, colon, _ = name.partition(":")
    if not colon or "/" in scheme or len(scheme) < 2:
        return local(os.path.join(folder, name))
    if scheme not in SCHEMES or "://" not in name or "::" in name:
        raise SampleError("name", f"not a path, nor a URL of {', '.join(SCHEMES)}: {name}"[:200])
    if scheme == "file":
        return local(name.removeprefix("file://"))
    import fsspec

    options, reading = {}, {}
    if scheme.startswith("http"):
        try:
            import aiohttp
        except ImportError:
            raise UserError(f"{name}: URLs need `pip install multimodal_fm[pack]`") from None
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=600, sock_connect=PATIENCE, sock_read=PATIENCE)
        }
        reading = {
            "block_size": 0,
            "size": LARGEST,
        }  # a stream; asking for the size first calls any failure "not found"
    for attempt in range(ATTEMPTS):
        try:
            with fsspec.filesystem(scheme, **options).open(name, "rb", **reading) as file:
                data, size = [], 0
                while size <= LARGEST and (block := file.read(1 << 20)):
                    data.append(block)
                    size += len(block)
            if size > LARGEST:
                raise SampleError("byte-limit", f"more than {LARGEST} bytes")
            return b"".join(data)
        except SampleError:
            raise
        except FileNotFoundError:
            raise SampleError("missing", f"{name}: not there"[:200]) from None
        except ImportError as error:
            raise UserError(f"{name}: {error}") from None
        except Exception as error:  # every filesystem has its own
            last = f"{type(error).__name__}: {error}"
            time.sleep(PAUSE * 2**attempt if attempt + 1 < ATTEMPTS else 0)
    raise SampleError("read", f"{name}: {last} ({ATTEMPTS} attempts)"[:200])


MAGIC = (
    ("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG"), ("gif", b"GIF8"), ("bmp", b"BM"), ("tif", b"II*\0"),
    ("tif", b"MM\0*"), ("flac", b"fLaC"), ("ogg", b"OggS"), ("mp3", b"ID3"), ("mp3", b"\xff\xfb"), ("mp3", b"\xff\xf3"),
    ("aiff", b"FORM"), ("au", b".snd"), ("caf", b"caff"),
)  # fmt: skip


def sniff(data: bytes, what: str, name: str) -> str:
    """The ending that the bytes ask for; the name's where they say nothing, so that the check names what is wrong."""
    if data[:4] == b"RIFF":
        return "webp" if data[8:12] == b"WEBP" else "wav"
    for ending, start in MAGIC:
        if data.startswith(start):
            return ending
    ending = name.rpartition(".")[2].lower()
    return ending if ending in (IMAGE_FILES if what == "image" else AUDIO_FILES) else {"image": "jpg"}.get(what, "wav")
